from faults import faulty_s3  # noqa: F401
