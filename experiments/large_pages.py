"""Large memory pages for a program that computes on a CPU."""

import os
import sys


def use() -> None:
  """Starts this program again, once, with a C library that asks for them.

  XLA frees a program's buffers after each run, and at the next the kernel
  clears the same gigabytes: in 450,000 page faults per step of `bench_cpu`, 8 %
  of its CPU time, or in 900 of 2 MB each (experiments/LOG.md).  glibc reads the
  setting when a process starts, and nothing else can make it.  Where there is
  another C library, or the kernel has no large pages, nothing changes.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, sys.orig_argv)
