"""No page has two owners unless they share it, and none is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_rpa.scheduling import OutOfPagesError, PageAllocator


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


def test_pages_that_nobody_has_held_take_no_memory():
    allocator = PageAllocator(2**31 - 1)
    assert allocator.allocate(2) == [0, 1] and allocator.num_held == 2
    allocator.free([1])
    assert allocator.allocate(2) == [1, 2] and allocator.num_free == 2**31 - 4


def test_out_of_pages_says_what_to_change():
    allocator = PageAllocator(3)
    allocator.allocate(2)
    with pytest.raises(OutOfPagesError, match=r"2 more pages .* 1 of 3 .*num_pages"):
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


def filled(num_pages=3, keys=(b"a", b"ab")):
    """An allocator with one holder of pages 0, 1, ... that have these keys."""
    allocator = PageAllocator(num_pages)
    pages = allocator.allocate(len(keys))
    for page, key in zip(pages, keys, strict=True):
        allocator.publish(page, key)
    return allocator


def test_a_published_page_is_shared_and_freed_by_its_last_holder():
    allocator = filled()
    assert [allocator.lookup(key) for key in (b"a", b"ab", b"b")] == [0, 1, None]
    allocator.hold([0, 1])
    assert allocator.num_holders(0) == 2 and allocator.num_free == 1
    allocator.free([0, 1])
    assert allocator.num_holders(0) == 1 and allocator.num_free == 1
    allocator.free([0, 1])
    assert allocator.num_holders(0) == 0 and allocator.num_free == 3
    with pytest.raises(ValueError, match="must be in use"):
        allocator.free([0])


def test_a_page_that_nobody_holds_comes_back_with_its_contents():
    allocator = filled()
    allocator.free([0, 1])
    page = allocator.lookup(b"a")
    assert page is not None
    allocator.hold([page])
    assert allocator.num_free == 2
    assert allocator.allocate(2) == [2, 1]  # the free one first
    assert allocator.lookup(b"ab") is None
    assert allocator.lookup(b"a") == 0


def test_the_pages_freed_longest_ago_are_reused_first_and_ends_before_beginnings():
    allocator = PageAllocator(4)
    for name in (b"x", b"y"):
        pages = allocator.allocate(2)
        for index, page in enumerate(pages):
            allocator.publish(page, name + b"%d" % index)
    allocator.free([2, 3])
    allocator.free([0, 1])
    assert [allocator.allocate(1)[0] for _ in range(4)] == [3, 2, 1, 0]
    assert not any(allocator.has_key(page) for page in range(4))


def test_equal_contents_are_found_once():
    allocator = filled(keys=(b"a", b"a"))
    assert allocator.lookup(b"a") == 0
    assert allocator.has_key(0) and not allocator.has_key(1)
    with pytest.raises(ValueError, match="must have a key to be shared, got 1"):
        allocator.hold([1])


def test_what_is_forgotten_is_not_found_and_its_page_is_used_again():
    allocator = filled(keys=(b"a", b"b"))
    allocator.free([1])
    for key in (b"a", b"b", b"c"):  # held, cached and unknown
        allocator.forget(key)
        assert allocator.lookup(key) is None
    assert allocator.num_held == 1 and allocator.num_free == allocator.num_pages - 1
    allocator.free([0])
    assert allocator.num_free == allocator.num_pages
    allocator.reset()
    assert len(allocator.allocate(allocator.num_pages)) == allocator.num_pages
