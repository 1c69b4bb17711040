"""Which characters of a source a BPE is trained on, and how many of its words differ."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokenizers.bpe_sample import (
    NUM_PLACES,
    NUM_RANKS,
    WORD_SAMPLING,
    DistinctWordCounter,
    rank_piece,
    read_fair_pieces,
)


def sample(sizes: list[int], max_characters: float) -> Counter[str]:
    """How many characters are taken of each file; its text is documents of 100 characters at most."""
    counts: Counter[str] = Counter()

    def read(shard: Shard) -> Iterator[str]:
        for start in range(0, shard.size or 0, 100):
            yield shard.name * min(100, (shard.size or 0) - start)

    shards = [Shard(chr(0x100 + number), "", size, "") for number, size in enumerate(sizes)]
    for piece in read_fair_pieces(shards, max_characters, read):
        counts[piece[0]] += len(piece)
    return counts


def test_each_file_gives_by_its_size():
    counts = sample([40_000, 100, 80_000, 40_000], 16_000)
    assert counts.total() == 16_000
    assert counts["\u0100"] == pytest.approx(4_000, abs=2 * 16_000 / NUM_PLACES)
    assert counts["\u0102"] == pytest.approx(8_000, abs=2 * 16_000 / NUM_PLACES)
    assert counts["\u0103"] == pytest.approx(4_000, abs=2 * 16_000 / NUM_PLACES)


def test_of_many_small_files_some_are_read_whole_at_places_that_lie_evenly():
    counts = sample([50] * 10_000, 25_600)
    assert set(counts.values()) == {50}
    numbers = sorted(ord(name) - 0x100 for name in counts)
    assert len(numbers) == 25_600 / 50
    firsts = [number for number in numbers if number - 1 not in numbers]
    assert len(firsts) == NUM_PLACES
    assert max(after - before for before, after in itertools.pairwise(firsts)) <= 10_000 / NUM_PLACES + 1


@pytest.mark.parametrize("max_characters", [float("inf"), 10_000, 560])
def test_all_is_read_of_what_is_no_more_than_may_be(max_characters: float):
    assert list(sample([30, 500, 0, 30], max_characters).values()) == [30, 500, 30]


def test_words_that_differ_are_counted_once():
    english, chinese, mixed = DistinctWordCounter(), DistinctWordCounter(), random.Random(1)
    common = ["".join(mixed.choices("abcdefgh", k=6)) for _ in range(20_000)]
    for _ in range(3):
        english.add(" ".join(common))
    assert english.num_bytes == pytest.approx(6 * len(set(common)), rel=0.15)
    for _ in range(3):
        chinese.add("".join(chr(0x4E00 + mixed.randrange(3000)) for _ in range(100_000)))
    assert chinese.num_bytes == pytest.approx(900_000, rel=0.15), "no two stretches are equal"
    same = DistinctWordCounter()
    same.add("=" * 100_000 + "\0" * 100_000 + " " * 100_000)
    assert same.num_bytes <= 3 * 64 * WORD_SAMPLING


def test_ranks_are_left_out_from_the_highest_until_the_words_are_few_enough():
    letters = random.Random(1)
    pieces = ["".join(chr(0x4E00 + letters.randrange(3000)) for _ in range(500)) for _ in range(2 * NUM_RANKS)]
    counter = DistinctWordCounter()
    for number, piece in enumerate(pieces):
        counter.add(piece, rank_piece(number))
    assert counter.most_ranks(counter.num_bytes) == NUM_RANKS
    num_ranks = counter.most_ranks(counter.num_bytes / 4)
    assert num_ranks == pytest.approx(NUM_RANKS / 4, rel=0.1)
    kept = DistinctWordCounter()
    for number, piece in enumerate(pieces):
        if rank_piece(number) < num_ranks:
            kept.add(piece)
    assert 0.95 * counter.num_bytes / 4 <= kept.num_bytes <= counter.num_bytes / 4


def test_something_is_always_learned_from():
    counter = DistinctWordCounter()
    for number in range(10 * WORD_SAMPLING):
        counter.add(f"word{number}", rank=0)
    assert counter.num_bytes > 0
    assert counter.most_ranks(0) == 1


def test_pieces_of_low_rank_lie_evenly_among_the_others():
    assert sorted(map(rank_piece, range(NUM_RANKS))) == list(range(NUM_RANKS))
    kept = [number for number in range(4 * NUM_RANKS) if rank_piece(number) < NUM_RANKS / 16]
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert max(gaps) <= 2 * 16
