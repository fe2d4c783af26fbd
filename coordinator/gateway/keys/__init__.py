"""Keys of devices: which may come in, codes by which one may enrol, and those that were refused."""

__all__ = ["allow_list", "enrolment_book", "enrolment_desk", "refused_keys", "zap"]
