"""What a log adds up to, by hand: no registry is needed to know it."""

from dreambooth.aliases import Action, Entry, counted, history


def entries(*moves: tuple[Action, int | None, int]) -> list[Entry]:
    return [
        Entry(number, action, "champion", before, after, "", "", 0.0)
        for number, (action, before, after) in enumerate(moves, 1)
    ]


def test_promotions_pile_up_and_a_rollback_takes_them_off() -> None:
    log = entries(("promote", None, 1), ("promote", 1, 2), ("promote", 2, 5), ("rollback", 5, 1))
    assert history(log, "champion") == [1]
    assert history(log[:3], "champion") == [1, 2, 5]
    assert history([*log, *entries(("promote", 1, 2))], "champion") == [1, 2]
    assert history([], "champion") == []


def test_of_two_entries_from_one_state_the_first_counts() -> None:
    log = entries(("promote", None, 1), ("promote", 1, 2), ("promote", 1, 3), ("promote", 3, 4))
    assert [entry.number for entry in counted(log, "champion")] == [1, 2]
    assert history(log, "champion") == [1, 2]


def test_a_refusal_and_another_alias_move_nothing() -> None:
    log = entries(("promote", None, 1), ("refuse", 1, 2))
    assert history(log, "champion") == [1]
    assert history(log, "challenger") == []


def test_a_version_may_be_champion_again() -> None:
    log = entries(("promote", None, 1), ("promote", 1, 2), ("promote", 2, 1), ("rollback", 1, 2))
    assert history(log[:3], "champion") == [1, 2, 1]
    assert history(log, "champion") == [1, 2]


def test_a_move_by_hand_is_a_champion_like_any_other() -> None:
    log = entries(("promote", None, 1), ("found", 1, 3), ("rollback", 3, 1))
    assert history(log[:2], "champion") == [1, 3]
    assert history(log, "champion") == [1]
