"""Names of many kinds, which stand for all the subjects that an edit is not about."""

from __future__ import annotations

import unicodedata

# Places, people, companies, works and things. Which ones matters little; that every kind is there matters, as
# what a write does to one country it does to others.
NAMES = [
    name.strip()
    for name in """
    Argentina; Bolivia; Chile; Colombia; Ecuador; Peru; Uruguay; Cuba; Jamaica; Mexico; Canada;
    Iceland; Denmark; Finland; Estonia; Lithuania; Hungary; Croatia; Serbia; Greece; Turkey; Egypt;
    Morocco; Algeria; Ghana; Kenya; Ethiopia; Zimbabwe; Saudi Arabia; Iran; Pakistan; Bangladesh;
    Thailand; Vietnam; Indonesia; South Korea; Mongolia; New Zealand; Madrid; Lisbon; Vienna;
    Budapest; Stockholm; Dublin; Edinburgh; Munich; Milan; Athens; Istanbul; Cairo; Nairobi; Mumbai;
    Bangkok; Shanghai; Osaka; Sydney; Toronto; Chicago; Houston; San Diego; Rio de Janeiro; Bavaria;
    Andalusia; Texas; Queensland; the Danube; Mount Kilimanjaro; Lake Victoria; the Amazon;
    the Golden Gate Bridge; the British Museum; the Brandenburg Gate; Charles Darwin; Marie Curie;
    Isaac Newton; Alan Turing; Emmy Noether; Ludwig van Beethoven; Johann Sebastian Bach;
    Frida Kahlo; Vincent van Gogh; Pablo Picasso; Jane Austen; Leo Tolstoy; Gabriel García Márquez;
    Haruki Murakami; Chinua Achebe; Winston Churchill; Nelson Mandela; Indira Gandhi;
    Abraham Lincoln; Simón Bolívar; Cleopatra; Julius Caesar; Joan of Arc; Pope Francis;
    Immanuel Kant; Confucius; Serena Williams; Lionel Messi; Michael Jordan; Usain Bolt;
    Wayne Gretzky; Roger Federer; Bob Dylan; Freddie Mercury; Miles Davis; Aretha Franklin;
    Meryl Streep; Akira Kurosawa; Alfred Hitchcock; Oprah Winfrey; John Smith; Anna Müller;
    Hiroshi Tanaka; Maria Rossi; Ivan Petrov; Fatima Hassan; Siemens; Philips; Samsung; Volkswagen;
    Ferrari; Boeing; Airbus; IBM; Amazon; Netflix; Coca-Cola; Nestlé; IKEA; Lufthansa; Barclays;
    Harvard University; the University of Oxford; NASA; the United Nations;
    the European Central Bank; Greenpeace; FC Barcelona; the Boston Celtics; the New York Yankees;
    The New York Times; Star Wars; The Godfather; Hamlet; War and Peace; The Simpsons; Friends;
    Sesame Street; The Rite of Spring; Swan Lake; Abbey Road; Windows 95; iPhone 12; PlayStation 4;
    Google Maps; Boeing 747; Toyota Corolla; Volkswagen Golf; Ford Mustang; Linux; Python;
    Minecraft; The Legend of Zelda; Christmas; the Renaissance; Buddhism; Latin; Esperanto; Mars;
    Jupiter; Oxygen; the honey bee; the giant panda
    """.split(";")
]


def other_names(subject: str) -> list[str]:
    """The names that neither hold the subject nor stand in it, whatever their case and accents."""
    own = _plain(subject)
    return [name for name in NAMES if _plain(name) not in own and own not in _plain(name)]


def _plain(text: str) -> str:
    parts = unicodedata.normalize("NFKD", text.casefold())
    return "".join(part for part in parts if not unicodedata.combining(part))
