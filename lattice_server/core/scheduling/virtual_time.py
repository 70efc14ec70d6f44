"""Owns how much of the cluster each caller has had. Rule: only what was held counts; no guess can cost anybody a turn.

Each caller has a clock that runs while its calls hold a share of the cluster, by that share. The caller whose clock is
furthest behind is next. One that comes, or comes back, starts where the clock of the one served last is: it can neither
save up turns nor be made to pay for the time before it came. When nobody waits, nobody is owed a turn, and all clocks
are set to the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

LOOK_AHEAD_S = 0.01  # Who holds more is that much further ahead already; it orders those whose clocks are the same.
MAX_ACCOUNTS = 1000


@dataclass(slots=True, eq=False)
class Account:
    """What one caller has had until `at`, the share it holds since, and what it was sent ahead, in share times seconds.

    `epoch` tells whether all clocks were set to the same since.
    """

    had: float
    at: float
    epoch: int
    share: float = 0.0
    ahead: float = 0.0


class Clocks:
    """The clocks of all callers that wait, hold something, or are ahead of others."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._max_accounts = MAX_ACCOUNTS
        self._served = 0.0
        self._epoch = 0
        self._level = 0.0
        self._level_at = 0.0

    def level(self, now: float) -> None:
        """Set all clocks to the same."""
        self._epoch += 1
        self._level, self._level_at = self._served, now

    def come(self, name: str, now: float) -> None:
        """Note that a caller waits that did not before."""
        account = self._account(name, now)
        account.had = max(account.had, self._served)

    def hold(self, name: str, share: float, now: float) -> None:
        """Note that a caller holds a share more of the cluster from now on; less, when it is negative."""
        account = self._account(name, now)
        account.share += share
        if abs(account.share) < 1e-12:
            account.share = 0.0

    def send_ahead(self, name: str, amount: float, now: float) -> None:
        """Note what a caller will use, in share times seconds, of what others hold now; less, when it is negative."""
        account = self._account(name, now)
        account.ahead = max(0.0, account.ahead + amount)

    def serve(self, name: str, now: float) -> None:
        """Note whose turn it was; whoever comes later starts from there."""
        self._served = max(self._served, self._account(name, now).had)

    def turn(self, name: str, now: float) -> float:
        """Return what orders callers: the one with the least is next."""
        return self._turn(self._account(name, now))

    def check(self, held: Mapping[str, float], ahead: Mapping[str, float]) -> None:
        """Assert that callers hold, and were sent ahead, what is counted for them."""
        assert held.keys() | ahead.keys() <= self._accounts.keys()
        for name, account in self._accounts.items():
            assert abs(account.share - held.get(name, 0.0)) < 1e-6, "a caller's clock runs at the wrong pace"
            assert abs(account.ahead - ahead.get(name, 0.0)) < 1e-6, "what a caller was sent ahead is miscounted"

    def _account(self, name: str, now: float) -> Account:
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= self._max_accounts:
                self._forget(now)
            account = self._accounts[name] = Account(self._served, now, self._epoch)
        elif account.at != now or account.epoch != self._epoch:
            self._advance(account, now)
        return account

    def _turn(self, account: Account) -> float:
        return account.had + account.share * LOOK_AHEAD_S + account.ahead

    def _advance(self, account: Account, now: float) -> None:
        if account.epoch != self._epoch:
            account.epoch, account.had, account.at = self._epoch, self._level, self._level_at
        if now > account.at:
            account.had += account.share * (now - account.at)
            account.at = now

    def _forget(self, now: float) -> None:
        """Forget callers who hold nothing and have had no more than one that comes; they would be no worse off."""
        for account in self._accounts.values():
            self._advance(account, now)
        self._accounts = {n: a for n, a in self._accounts.items() if a.share or a.ahead or a.had > self._served}
        self._max_accounts = max(MAX_ACCOUNTS, 2 * len(self._accounts))
