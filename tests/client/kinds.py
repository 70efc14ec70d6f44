"""Objects of many types: the script that creates them, a task that describes them, and the expected descriptions."""

from typing import Any

KINDS: dict[str, tuple[str, str, Any]] = {
    "cached function": (
        """
            import functools
            @functools.lru_cache(3)
            def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
        """,
        "[fib(30), fib.cache_info().maxsize, fib.__name__, fib.cache_parameters()['typed'], fib.__wrapped__(1)]",
        [832040, 3, "fib", False, 1],
    ),
    "cached function of a partial": (
        """
            import functools
            cached = functools.cache(functools.partial(pow, 2))
        """,
        "[cached(3), cached(3), cached.cache_info().hits]",
        [8, 8, 1],
    ),
    "cached method and property": (
        """
            import functools
            class C:
                @functools.cached_property
                def a(self): return [1]
                @functools.lru_cache
                def b(self): return [2]
            c = C()
            c.a
        """,
        "[c.a, C().a, C.b is C.b, c.b() is c.b(), C.a.attrname]",
        [[1], [1], True, True, "a"],
    ),
    "single dispatch": (
        """
            import functools
            @functools.singledispatch
            def show(x): return 'any'
            @show.register
            def _(x: int): return 'int'
            class S:
                @functools.singledispatchmethod
                def m(self, x): return 'any'
                @m.register
                def _(self, x: int): return 'int'
        """,
        "[show(1), show('x'), show(True), S().m(1), S().m('x')]",
        ["int", "any", "int", "int", "any"],
    ),
    "slots": (
        """
            import dataclasses
            class A:
                __slots__ = ('a', '__b')
                def __init__(self): self.a = self.__b = 1
                def b(self): return self.__b
            @dataclasses.dataclass(slots=True, frozen=True)
            class D:
                x: int = 3
            a = A()
        """,
        "[hasattr(A(), '__dict__'), hasattr(D(), '__dict__'), a.b(), D().x, D(1) == D(1)]",
        [False, False, 1, 3, True],
    ),
    "metaclass": (
        """
            class Meta(type):
                def __getitem__(cls, x): return (cls.__name__, x)
            class M(metaclass=Meta): pass
        """,
        "[list(M[3]), type(M).__name__]",
        [["M", 3], "Meta"],
    ),
    "abstract class": (
        """
            import abc
            class Base(abc.ABC):
                @abc.abstractmethod
                def f(self): ...
            class One(Base):
                def f(self): return super().f() or 1
            @Base.register
            class Two: pass
        """,
        "[One().f(), issubclass(Two, Base), sorted(Base.__abstractmethods__)]",
        [1, True, ["f"]],
    ),
    "enumerations": (
        """
            import enum
            class E(str, enum.Enum):
                A = 'a'
                def up(self): return self.value.upper()
            class F(enum.Flag):
                X = 1
                Y = 2
            e = E.A
        """,
        "[e is E.A, E('a').up(), (F.X | F.Y).value, E['A'] == 'a']",
        [True, "A", 3, True],
    ),
    "generics": (
        """
            import typing
            T = typing.TypeVar('T', bound=int)
            P = typing.ParamSpec('P')
            U = typing.NewType('U', int)
            class G(typing.Generic[T]):
                x: T
            class H(G[int]): pass
            def f(c: typing.Callable[P, T]) -> U: return U(c)
        """,
        "[H.__orig_bases__[0].__args__[0].__name__, T.__bound__.__name__, f(3), G[int].__origin__ is G, P.__name__, "
        "f.__annotations__['return'] is U, G.__parameters__[0] is T]",
        ["int", "int", 3, True, "P", True, True],
    ),
    "typed tuples and dicts": (
        """
            import typing, collections
            class N(typing.NamedTuple):
                a: int
                b: int = 2
                def s(self): return self.a + self.b
            class D(typing.TypedDict, total=False):
                a: int
            class I(D):
                b: typing.Required[str]
            class P(typing.Protocol):
                def f(self): ...
            Q = typing.runtime_checkable(P)
            C = collections.namedtuple('C', 'x', defaults=[4])
        """,
        "[N(1).s(), list(N(1)), D(a=1), isinstance(N(1), Q), C().x, N._field_defaults, "
        "sorted(D.__optional_keys__), sorted(I.__required_keys__)]",
        [3, [1, 2], {"a": 1}, False, 4, {"b": 2}, ["a"], ["b"]],
    ),
    "closures and recursion": (
        """
            def make(n):
                def up():
                    nonlocal n
                    n += 1
                    return n
                return up, lambda: n
            up, see = make(1)
            def even(n): return n == 0 or odd(n - 1)
            def odd(n): return n != 0 and even(n - 1)
            count = 0
            def bump():
                global count
                count += 1
                return count
        """,
        "[up(), see(), even(7), bump(), bump(), count]",
        [2, 2, False, 1, 2, 2],
    ),
    "properties and descriptors": (
        """
            class P:
                def __init__(self): self._x = 1
                @property
                def x(self): return self._x
                @x.setter
                def x(self, v): self._x = v
                @staticmethod
                def s(): return 2
                @classmethod
                def c(cls): return cls.__name__
                def __init_subclass__(cls): cls.sub = True
            class K(P): pass
            p = P()
        """,
        "[p.x, setattr(p, 'x', 5), p.x, P.s(), P.c(), K.sub]",
        [1, None, 5, 2, "P", True],
    ),
    "asynchronous functions": (
        """
            import asyncio
            async def gen():
                for i in range(3): yield i
            async def total(): return sum([i async for i in gen()])
        """,
        "[asyncio.run(total()), asyncio.iscoroutinefunction(total)]",
        [3, True],
    ),
    "weak collections": (
        """
            import weakref
            class K: pass
            key = K()
            W = weakref.WeakKeyDictionary({key: 1})
            V = weakref.WeakValueDictionary(a=key)
            S = weakref.WeakSet([key])
        """,
        "[W[key], V['a'] is key, key in S, len(W)]",
        [1, True, True, 1],
    ),
    "modules": (
        """
            import os.path, xml.dom, json as j
            import concurrent.futures
        """,
        "[os.path.basename('a/b'), j.loads('1'), concurrent.futures.ThreadPoolExecutor.__name__, "
        "xml.dom.Node.TEXT_NODE]",
        ["b", 1, "ThreadPoolExecutor", 3],
    ),
    "shared and cyclic values": (
        """
            a = []
            a.append(a)
            shared = {}
            b = [shared, shared]
            class Node: pass
            n = Node()
            n.me = n
            n.kind = Node
        """,
        "[a[0] is a, b[0] is b[1] is shared, n.me is n, n.kind is type(n) is Node]",
        [True, True, True, True],
    ),
    "exceptions": (
        """
            class E(Exception):
                def __init__(self, code, *, why): super().__init__(code); self.why = why
            def fails():
                try: raise E(3, why='x')
                except* E as group: found = group.exceptions[0].why
                return found
        """,
        "[fails(), E(1, why='y').why, issubclass(E, Exception)]",
        ["x", "y", True],
    ),
    "contexts and generators": (
        """
            import contextlib
            @contextlib.contextmanager
            def opened(x): yield x
            def use():
                with opened(3) as x: return x
            def some(): yield from range(3)
            match = lambda v: [x for x in v if (y := x)]
        """,
        "[use(), list(some()), match([0, 1])]",
        [3, [0, 1, 2], [1]],
    ),
}
