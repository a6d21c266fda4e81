"""Keep freed memory for the next network evaluation instead of giving it back to the system."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to reuse freed blocks of any size; whether it could be told.

    Activations of an evaluation are megabytes each. By default glibc maps such blocks anew every time and the system
    clears them, which costs time on some machines and batch sizes and nothing on others (the model card says what it
    was where that was measured). It applies to the whole process, so only programs call it, never a library function.
    Elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
