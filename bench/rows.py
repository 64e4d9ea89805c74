"""What is kept of a measured case, and the operation that it is of. Needs nothing but Python."""


def row(case: str, ours: str, variants: dict[str, dict], traffic: float, floor: float, work=None) -> dict:
    """Return what is kept of a case; the share of the floor is by the GPU's clock where there is one."""
    mine = variants[ours]
    seconds = mine["seconds"]["median"]
    device = mine.get("device_seconds", {}).get("median")
    clock = device or seconds
    others = {name: kept for name, kept in variants.items() if name != ours}
    return {
        "case": case,
        "ours": ours,
        "device": "cpu" if device is None else "cuda",
        "seconds": seconds,
        "device_seconds": device,
        "error": mine["error"],
        "traffic": traffic,
        "work": work or {},
        "floor": floor,
        "gigabytes_per_second": traffic / clock / 1e9,
        "share_of_floor": floor / clock,
        "ratios": {name: kept["seconds"]["median"] / seconds for name, kept in others.items()},
        "device_ratios": {
            name: kept["device_seconds"]["median"] / device
            for name, kept in others.items()
            if device is not None and "device_seconds" in kept
        },
        "variants": variants,
    }


def operation(line: dict) -> str:
    """The part of a case's name before its device."""
    return line["case"].partition(f" {line['device']} ")[0]


def by_operation(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for line in rows:
        found.setdefault(operation(line), []).append(line)
    return found
