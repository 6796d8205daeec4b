"""The fleet of the integration tests. Tests in the lab take that of the system tests instead."""

from integration.conftest import event_listener, fleet, master_host, master_only, salt_factories

__all__ = ["event_listener", "fleet", "master_host", "master_only", "salt_factories"]
