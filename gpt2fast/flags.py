"""A flag whose name Python keeps for itself. In a dataclass: `from_: "Annotated[Path | None, named_from()]" = None`."""


def named_from():
    """tyro's word for: call it --from."""
    import tyro

    return tyro.conf.arg(name="from")
