"""What is the user's to mend: a sentence with the offending value and what to do."""

import errno


class UserError(ValueError):
    pass


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""What only happens to files that are written."""


def unusable(error: Exception) -> str | None:
    """The file, or just "a disk", that an error is about which is the user's to mend, too: it is full, or no folder."""
    if not isinstance(error, OSError) or not error.strerror:
        return None
    return error.filename2 or error.filename or ("a disk" if error.errno in DISK else None)
