"""No page has two owners, and none is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_rpa.generate.page_allocator import OutOfPagesError, PageAllocator


@given(
    num_pages=st.integers(1, 20),
    requests=st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=40),
)
def test_every_page_is_free_or_has_one_owner(num_pages, requests):
    allocator = PageAllocator(num_pages)
    owned: list[list[int]] = []
    for wants_pages, number in requests:
        if wants_pages:
            num_free = allocator.num_free
            if number <= num_free:
                owned.append(allocator.allocate(number))
            else:
                with pytest.raises(OutOfPagesError):
                    allocator.allocate(number)
                assert allocator.num_free == num_free
        elif owned:
            allocator.free(owned.pop(number % len(owned)))
        in_use = [page for pages in owned for page in pages]
        assert len(in_use) == len(set(in_use))
        assert set(in_use) <= set(range(num_pages))
        assert allocator.num_free == num_pages - len(in_use)
    for pages in owned:
        allocator.free(pages)
    assert sorted(allocator.allocate(num_pages)) == list(range(num_pages))


def test_out_of_pages_says_what_to_change():
    allocator = PageAllocator(3)
    allocator.allocate(2)
    with pytest.raises(OutOfPagesError, match=r"2 more pages .* 1 of 3 .*--num-pages"):
        allocator.allocate(2)


@pytest.mark.parametrize("pages", [[0, 0], [2], [-1]])
def test_only_pages_in_use_can_be_freed(pages):
    allocator = PageAllocator(4)
    assert allocator.allocate(1) == [0]
    with pytest.raises(ValueError, match="must be in use"):
        allocator.free(pages)


def test_counts_must_make_sense():
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        PageAllocator(0)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        PageAllocator(1).allocate(-1)
