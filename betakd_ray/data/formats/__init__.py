"""Forms in which people have their data. One module a form: each yields (where it stands, record) for `records`."""

from betakd_ray.data.formats.sources import FORMATS, Rows, open_source

__all__ = ["FORMATS", "Rows", "open_source"]
