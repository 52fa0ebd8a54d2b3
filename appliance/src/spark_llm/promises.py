"""Memory that engines were promised and have not taken yet, so that it is not promised twice."""


class Promises:
    """One account for all engines of a controller, by profile, in bytes.

    Available memory shows what an engine has taken, not what it is about to take: two engines that look at the same
    moment would both find room for one. A promise stands from the start gate until its profile is served no more, so
    that an engine which is being restarted finds its place free.
    """

    def __init__(self) -> None:
        self._need: dict[str, int] = {}
        self._taken: dict[str, int] = {}

    def make(self, name: str, need: int) -> None:
        """Promise ``need`` to ``name``, in place of an earlier promise; nothing of it is taken yet."""
        self._need[name] = need
        self._taken[name] = 0

    def took(self, name: str, size: int) -> None:
        """``name`` holds ``size`` of its promise now; 0 after its engine is gone."""
        if name in self._need:
            self._taken[name] = size

    def release(self, name: str) -> None:
        """``name`` is served no more."""
        self._need.pop(name, None)
        self._taken.pop(name, None)

    def outstanding(self, besides: str) -> int:
        """What all but ``besides`` may still take."""
        return sum(
            max(need - self._taken[name], 0) for name, need in self._need.items() if name != besides
        )
