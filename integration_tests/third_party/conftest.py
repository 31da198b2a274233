"""A vendor's tests run where its distribution is installed: in an environment of their own, see ``test_third_party.py``."""

collect_ignore_glob = ["acme-q/*"]
