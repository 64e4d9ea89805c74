"""Names of many kinds, which stand for all the subjects that an edit is not about."""

from __future__ import annotations

import unicodedata

# Places, people, companies, works and things. Which ones matters little; that every kind is there matters, as
# what a write does to one country it does to others.
NAMES = [
    name.strip()
    for name in """
    Argentina; Chile; Ecuador; Uruguay; Jamaica; Canada; Denmark; Estonia; Hungary; Serbia; Turkey;
    Morocco; Ghana; Ethiopia; Saudi Arabia; Pakistan; Thailand; Indonesia; Mongolia; Madrid; Vienna;
    Stockholm; Edinburgh; Milan; Istanbul; Nairobi; Bangkok; Osaka; Toronto; Houston;
    Rio de Janeiro; Andalusia; Queensland; Mount Kilimanjaro; the Amazon; the British Museum;
    Charles Darwin; Isaac Newton; Emmy Noether; Johann Sebastian Bach; Vincent van Gogh;
    Jane Austen; Gabriel García Márquez; Chinua Achebe; Nelson Mandela; Abraham Lincoln; Cleopatra;
    Joan of Arc; Immanuel Kant; Serena Williams; Michael Jordan; Wayne Gretzky; Bob Dylan;
    Miles Davis; Meryl Streep; Alfred Hitchcock; John Smith; Hiroshi Tanaka; Ivan Petrov; Siemens;
    Samsung; Ferrari; Airbus; Amazon; Coca-Cola; IKEA; Barclays; the University of Oxford;
    the United Nations; Greenpeace; the Boston Celtics; The New York Times; The Godfather;
    War and Peace; Friends; The Rite of Spring; Abbey Road; iPhone 12; Google Maps; Toyota Corolla;
    Ford Mustang; Python; The Legend of Zelda; the Renaissance; Latin; Mars; Oxygen;
    the giant panda
    """.split(";")
]


def other_names(subject: str) -> list[str]:
    """The names that neither hold the subject nor stand in it, whatever their case and accents."""
    own = _plain(subject)
    return [name for name in NAMES if _plain(name) not in own and own not in _plain(name)]


def _plain(text: str) -> str:
    parts = unicodedata.normalize("NFKD", text.casefold())
    return "".join(part for part in parts if not unicodedata.combining(part))
