"""Written for a surface that this q-core doesn't have yet."""

from __future__ import annotations

from q_core.backend import SURFACE_VERSION, Availability, Backend

backend = Backend(
    name="acme_newer",
    device_types=("cpu",),
    surface_version=SURFACE_VERSION + 1,
    priority=300,
    probe=lambda: Availability(True, "never asked"),
    families=("acme_newer.ops_of_tomorrow",),
)
