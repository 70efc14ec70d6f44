"""Owns how much of the cluster each tenant has used. Rule: only actual use counts, never an estimate.

Each tenant has a virtual clock that advances while its leases hold a share of the cluster, at the rate of that share.
The tenant whose clock is furthest behind is next. A tenant that starts to queue begins at the clock of the tenant
served last, so that it cannot save up time. When the queue becomes empty, all clocks are set to the same time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

LOOK_AHEAD_S = 0.01  # By how long a present share counts in advance: it orders tenants whose clocks are the same.
MAX_ACCOUNTS = 1000


@dataclass(slots=True, eq=False)
class Account:
    """The clock of one tenant, in share times seconds.

    It has `used` this much until `at`, and holds `share` since. `ahead` is the expected use of its leases that wait
    behind others. `epoch` counts how often all clocks were set to the same time.
    """

    used: float
    at: float
    epoch: int
    share: float = 0.0
    ahead: float = 0.0


class TenantClocks:
    """The clocks of all tenants that queue, hold a share, or are ahead of others."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._max_accounts = MAX_ACCOUNTS
        self._served = 0.0
        self._epoch = 0
        self._level = 0.0
        self._level_at = 0.0

    def level(self, now: float) -> None:
        """Set all clocks to the same time."""
        self._epoch += 1
        self._level, self._level_at = self._served, now

    def join(self, name: str, now: float) -> None:
        """Note that a tenant starts to queue."""
        account = self._account(name, now)
        account.used = max(account.used, self._served)

    def add_share(self, name: str, share: float, now: float) -> None:
        """Add to the share of the cluster that a tenant holds; a negative share takes away."""
        account = self._account(name, now)
        account.share += share
        if abs(account.share) < 1e-12:
            account.share = 0.0

    def send_ahead(self, name: str, amount: float, now: float) -> None:
        """Add to the expected use, in share times seconds, of a tenant's leases that wait behind others."""
        account = self._account(name, now)
        account.ahead = max(0.0, account.ahead + amount)

    def serve(self, name: str, now: float) -> None:
        """Note which tenant was served; tenants that start to queue later begin at its clock."""
        self._served = max(self._served, self._account(name, now).used)

    def time(self, name: str, now: float) -> float:
        """Return the virtual time of a tenant; the tenant with the least is next."""
        account = self._account(name, now)
        return account.used + account.share * LOOK_AHEAD_S + account.ahead

    def check(self, held: Mapping[str, float], ahead: Mapping[str, float]) -> None:
        """Assert that the shares and the expected use of tenants are those of their leases."""
        assert held.keys() | ahead.keys() <= self._accounts.keys()
        for name, account in self._accounts.items():
            assert abs(account.share - held.get(name, 0.0)) < 1e-6, "a clock advances at the wrong rate"
            assert abs(account.ahead - ahead.get(name, 0.0)) < 1e-6, "the expected use is miscounted"

    def _account(self, name: str, now: float) -> Account:
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= self._max_accounts:
                self._forget(now)
            account = self._accounts[name] = Account(self._served, now, self._epoch)
        elif account.at != now or account.epoch != self._epoch:
            self._advance(account, now)
        return account

    def _advance(self, account: Account, now: float) -> None:
        if account.epoch != self._epoch:
            account.epoch, account.used, account.at = self._epoch, self._level, self._level_at
        if now > account.at:
            account.used += account.share * (now - account.at)
            account.at = now

    def _forget(self, now: float) -> None:
        """Forget tenants that hold no share and whose clocks are not ahead of where a new one begins."""
        for account in self._accounts.values():
            self._advance(account, now)
        self._accounts = {n: a for n, a in self._accounts.items() if a.share or a.ahead or a.used > self._served}
        self._max_accounts = max(MAX_ACCOUNTS, 2 * len(self._accounts))
