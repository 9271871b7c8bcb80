"""How people are told apart from one list of them to the next."""

from app.events.parties import Party, furthest_of, keys_of, raised

ADA = Party("ada@example.com", "Ada", "Signer", 1)


class TestTheKeys:
    def test_are_as_databases_hold_them(self) -> None:
        """They stand in the marks of every envelope: a new spelling would forget who signed."""
        parties = (
            Party("Ada@Example.com", order=3),
            Party(order=7),
            Party(name="Bob"),
            Party("ada@example.com"),
        )

        assert ["@ada@example.com", "#7", "[2]", "@ada@example.com 2"] == keys_of(parties)

    def test_of_those_without_an_address_follow_their_order(self) -> None:
        first, second = Party(name="Ada", order=1), Party(name="Bob", order=2)

        assert keys_of((first, second)) == list(reversed(keys_of((second, first))))


class TestTheFurthest:
    def test_is_kept_also_of_those_who_are_not_in_the_list(self) -> None:
        viewed = Party("bob@example.com", status="viewed")

        furthest = furthest_of({"@ada@example.com": "signed"}, ["@bob@example.com"], (viewed,))

        assert {"@ada@example.com": "signed", "@bob@example.com": "viewed"} == furthest

    def test_is_what_everybody_in_the_list_is_raised_to(self) -> None:
        (party,) = raised((ADA,), ["@ada@example.com"], {"@ada@example.com": "signed"})

        assert Party("ada@example.com", "Ada", "Signer", 1, "signed") == party
