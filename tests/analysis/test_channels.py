"""Streams of communication: first in, first out; streams of one axis share its link."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp_ir.analysis.channels import Channels

SENT = st.lists(
    st.tuples(st.sampled_from(["sp", "sp:gradients", "dp"]), st.floats(0.1, 4.0), st.floats(0.0, 3.0)), max_size=12
)


def test_a_stream_sends_one_after_the_other() -> None:
    channels: Channels[str] = Channels()
    channels.start("a", "sp", 2.0, now=0.0)
    channels.start("b", "sp", 1.0, now=0.5)
    assert (channels.done_at("a"), channels.done_at("b")) == (2.0, 3.0)
    channels.advance(2.5)
    assert channels.is_done("a") and not channels.is_done("b") and channels.begun_at("b") == 2.0


def test_two_streams_of_one_axis_share_its_link() -> None:
    channels: Channels[str] = Channels()
    channels.start("exchange", "sp", 1.0, now=0.0)
    channels.start("gradient", "sp:gradients", 3.0, now=0.0)
    assert channels.done_at("exchange") == pytest.approx(2.0)
    assert channels.done_at("gradient") == pytest.approx(4.0)


def test_what_waits_its_turn_finds_no_room_beside_what_fills_the_device() -> None:
    channels: Channels[str] = Channels()
    channels.start("first", "sp", 1.0, now=0.0)
    channels.start("second", "sp", 1.0, now=0.0)
    channels.start("other", "sp:gradients", 1.0, now=0.0)
    channels.start("copy", "autosp.offload", 1.0, now=0.0, room=False)
    channels.start("copy behind it", "autosp.offload", 1.0, now=0.0, room=False)
    channels.advance(10.0, crowded=True)
    assert channels.done_at("first") == pytest.approx(2.0), "what is under way shares the link, and goes on"
    assert channels.done_at("other") == pytest.approx(2.0)
    assert (channels.done_at("copy"), channels.done_at("copy behind it")) == (1.0, 2.0)
    assert not channels.is_done("second")
    channels.advance(10.0)
    assert channels.begun_at("second") == 10.0 and channels.done_at("second") == 11.0


def test_axes_do_not_share_a_link() -> None:
    channels: Channels[str] = Channels()
    channels.start("a", "sp", 1.0, now=0.0)
    channels.start("b", "dp", 3.0, now=0.0)
    assert (channels.done_at("a"), channels.done_at("b")) == (1.0, 3.0)


@given(SENT)
def test_a_link_is_never_idle_while_something_waits_for_it(sent: list[tuple[str, float, float]]) -> None:
    channels: Channels[int] = Channels()
    now, free = 0.0, {"sp": 0.0, "dp": 0.0}
    for key, (stream, seconds, pause) in enumerate(sent):
        now += pause
        channels.start(key, stream, seconds, now)
        axis = stream[:2]
        free[axis] = max(free[axis], now) + seconds
    assert channels.drain() == pytest.approx(max(free.values()) if sent else 0.0)
    for stream in {s for s, _, _ in sent}:
        arrived = [channels.done_at(k) for k, (s, _, _) in enumerate(sent) if s == stream]
        assert arrived == sorted(arrived)


@given(SENT)
def test_a_preview_changes_nothing(sent: list[tuple[str, float, float]]) -> None:
    looked: Channels[int] = Channels()
    silent: Channels[int] = Channels()
    now = 0.0
    for key, (stream, seconds, pause) in enumerate(sent):
        now += pause
        for channels in (looked, silent):
            channels.start(key, stream, seconds, now)
        assert looked.done_at(key) >= now
    for channels in (looked, silent):
        channels.advance(inf)
    assert [looked.done_at(k) for k in range(len(sent))] == [silent.done_at(k) for k in range(len(sent))]
