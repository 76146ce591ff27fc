"""Which tokens of which requests a step computes, and in which pages; plain Python."""

from torch_rpa.scheduling.page_allocator import OutOfPagesError as OutOfPagesError
from torch_rpa.scheduling.page_allocator import PageAllocator as PageAllocator
from torch_rpa.scheduling.request import Request as Request
from torch_rpa.scheduling.scheduler import Row as Row
from torch_rpa.scheduling.scheduler import Scheduler as Scheduler

__all__ = ["OutOfPagesError", "PageAllocator", "Request", "Row", "Scheduler"]
