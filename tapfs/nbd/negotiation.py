"""The negotiation with one NBD client: which disk it wants, and how requests and replies look from then on.

A client is a stranger. Options and names have a longest length, a client has so many options, and the whole has a time
limit, which the caller sets. A client that breaks the protocol is cut off.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from tapfs.kernel.nbd_server import Style
from tapfs.nbd import messages
from tapfs.nbd.messages import Handshake, Info, MalformedError, Option, Reply, Transmission

#: Of the data of an option, in bytes: room for a name and for a few hundred queries. What is longer is read and dropped
#: up to the second length, and ends the connection beyond.
_MAX_DATA, _MAX_DROPPED = 64 << 10, 1 << 20

#: Options that one client may send.
_MAX_OPTIONS = 256

#: Bytes that are read at once of what is dropped.
_PIECE = 64 << 10


class Rejected(Exception):  # noqa: N818 - it is no error of ours
    """The client broke the protocol, or has gone."""


class Gone(Rejected):
    """The client has gone: it may have wanted to know no more than whether there is a server, and what exports."""


class Channel(Protocol):
    """A way to the client and back."""

    async def receive(self, length: int) -> bytes:
        """Exactly so many bytes. Raises Rejected if the client has gone."""
        ...

    async def send(self, data: bytes) -> None:
        """Send all of it. Raises Rejected if the client has gone."""
        ...


class Offer(Protocol):
    """An export, as far as the negotiation knows it."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def description(self) -> str:
        """A line for people."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def flags(self) -> Transmission:
        """What a client may do with it."""
        ...

    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """The least, the preferred and the greatest length of a request, in bytes."""
        ...

    @property
    def contexts(self) -> Sequence[str]:
        """The names of its metadata contexts; the place of a name is the number of the context."""
        ...


class Chosen(NamedTuple):
    """What a client has chosen: a place in the list of exports, the style of replies, contexts bit by bit."""

    export: int
    style: Style
    contexts: int


class Negotiation:
    """One client's negotiation. `start_tls` gives the channel to go on with; None: there is no TLS.

    `tls_required`: nothing is said of the exports, and none is served, before TLS.
    """

    def __init__(
        self,
        channel: Channel,
        exports: Sequence[Offer],
        *,
        start_tls: Callable[[], Awaitable[Channel]] | None = None,
        tls_required: bool = False,
    ) -> None:
        self._channel = channel
        self._exports = exports
        self._start_tls = start_tls
        self._closed_without_tls = tls_required
        self._secure = False
        self._padded = True
        self._style = Style.SIMPLE
        #: The export that contexts were selected for, and which.
        self._selected: tuple[int, int] | None = None

    async def run(self) -> Chosen | None:
        """Negotiate to the end; None: the client has left in order. Raises Rejected."""
        fixed = await self._greet()
        for _ in range(_MAX_OPTIONS):
            header = messages.option_header(await self._channel.receive(messages.OPTION_BYTES))
            if header is None or (not fixed and header.option != Option.EXPORT_NAME):
                raise Rejected("it sent no option")
            if header.length > _MAX_DATA:
                await self._drop(header)
                continue
            data = await self._channel.receive(header.length)
            if header.option == Option.ABORT:
                with suppress(Gone):  # who has said that it ends need not wait for the answer
                    await self._reply(Option.ABORT, Reply.ACK)
                return None
            chosen = await self._answer(header.option, data)
            if chosen is not None:
                return chosen
        raise Rejected("it sent too many options")

    async def _greet(self) -> bool:
        """Exchange flags; whether the client speaks the fixed newstyle."""
        offered = int(Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES)
        await self._channel.send(messages.GREETING + offered.to_bytes(2, "big"))
        said = int.from_bytes(await self._channel.receive(4), "big")
        if said & ~offered:
            raise Rejected("it set flags that were not offered")
        self._padded = not said & Handshake.NO_ZEROES
        return bool(said & Handshake.FIXED_NEWSTYLE)

    async def _drop(self, header: messages.OptionHeader) -> None:
        if header.length > _MAX_DROPPED or header.option == Option.EXPORT_NAME:
            raise Rejected("it sent an option that is too long")
        left = header.length
        while left:
            left -= len(await self._channel.receive(min(left, _PIECE)))
        await self._reply(header.option, Reply.ERR_TOO_BIG)

    async def _reply(self, option: int, kind: Reply, data: bytes = b"") -> None:
        await self._channel.send(messages.reply(option, kind, data))

    async def _fail(self, option: int, kind: Reply, why: str) -> None:
        await self._reply(option, kind, why.encode())

    async def _answer(self, option: int, data: bytes) -> Chosen | None:
        """Answer an option; what the client has chosen if that was the last one."""
        if self._closed_without_tls and not self._secure and option != Option.STARTTLS:
            if option == Option.EXPORT_NAME:
                raise Rejected("it asked for an export without TLS")
            await self._fail(option, Reply.ERR_TLS_REQD, "this server wants TLS first")
            return None
        try:
            match option:
                case Option.EXPORT_NAME:
                    return await self._take_at_once(data)
                case Option.LIST:
                    await self._list(data)
                case Option.STARTTLS:
                    await self._secure_channel(data)
                case Option.INFO | Option.GO:
                    return await self._inform(Option(option), data)
                case Option.STRUCTURED_REPLY | Option.EXTENDED_HEADERS:
                    await self._set_style(Option(option), data)
                case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                    await self._contexts(Option(option), data)
                case _:
                    await self._fail(option, Reply.ERR_UNSUP, "this server does not know the option")
        except MalformedError as error:
            if option == Option.EXPORT_NAME:
                raise Rejected(str(error)) from error
            if option == Option.SET_META_CONTEXT:
                self._selected = None
            await self._fail(option, Reply.ERR_INVALID, str(error))
        return None

    def _find(self, name: str) -> int | None:
        """The export of that name; the first one is there under the empty name, too."""
        for number, export in enumerate(self._exports):
            if export.name == name:
                return number
        return 0 if name == "" else None

    def _chosen(self, number: int) -> Chosen:
        contexts = self._selected[1] if self._selected is not None and self._selected[0] == number else 0
        return Chosen(number, self._style, contexts)

    async def _take_at_once(self, data: bytes) -> Chosen:
        number = self._find(messages.text(data))
        if number is None:
            raise Rejected("it asked for an export that is not there")
        export = self._exports[number]
        await self._channel.send(messages.export_reply(export.size, export.flags, padded=self._padded))
        return self._chosen(number)

    async def _list(self, data: bytes) -> None:
        messages.Reader(data).end()
        for export in self._exports:
            await self._reply(Option.LIST, Reply.SERVER, messages.server_reply(export.name, export.description))
        await self._reply(Option.LIST, Reply.ACK)

    async def _secure_channel(self, data: bytes) -> None:
        messages.Reader(data).end()
        if self._start_tls is None:
            await self._fail(Option.STARTTLS, Reply.ERR_POLICY, "this server has no TLS")
        elif self._secure:
            await self._fail(Option.STARTTLS, Reply.ERR_INVALID, "TLS is there already")
        else:
            await self._reply(Option.STARTTLS, Reply.ACK)
            self._channel = await self._start_tls()
            self._secure = True
            # What was agreed in the clear may have been somebody else's wish.
            self._style, self._selected = Style.SIMPLE, None

    async def _inform(self, option: Option, data: bytes) -> Chosen | None:
        name, wanted = messages.info_request(data)
        number = self._find(name)
        if number is None:
            await self._fail(option, Reply.ERR_UNKNOWN, "there is no export of this name")
            return None
        export = self._exports[number]
        await self._reply(option, Reply.INFO, messages.export_info(export.size, self._flags_of(export)))
        if Info.NAME in wanted:
            await self._reply(option, Reply.INFO, messages.text_info(Info.NAME, export.name))
        if Info.DESCRIPTION in wanted:
            await self._reply(option, Reply.INFO, messages.text_info(Info.DESCRIPTION, export.description))
        await self._reply(option, Reply.INFO, messages.block_size_info(*export.block_sizes))
        await self._reply(option, Reply.ACK)
        return self._chosen(number) if option is Option.GO else None

    def _flags_of(self, export: Offer) -> Transmission:
        """What the client may do with an export, in the style that was agreed on."""
        extended = self._style is Style.EXTENDED
        return export.flags | Transmission.BLOCK_STATUS_PAYLOAD if extended else export.flags

    async def _set_style(self, option: Option, data: bytes) -> None:
        messages.Reader(data).end()
        wanted = Style.EXTENDED if option is Option.EXTENDED_HEADERS else Style.STRUCTURED
        self._style = max(self._style, wanted)
        await self._reply(option, Reply.ACK)

    async def _contexts(self, option: Option, data: bytes) -> None:
        if option is Option.SET_META_CONTEXT:
            self._selected = None
        name, queries = messages.context_request(data)
        if self._style is Style.SIMPLE:
            await self._fail(option, Reply.ERR_INVALID, "structured replies come first")
            return
        number = self._find(name)
        if number is None:
            await self._fail(option, Reply.ERR_UNKNOWN, "there is no export of this name")
            return
        selected = 0
        for context, known in enumerate(self._exports[number].contexts):
            listing = option is Option.LIST_META_CONTEXT
            if known in queries or (listing and (not queries or any(_covers(query, known) for query in queries))):
                selected |= 1 << context
                await self._reply(option, Reply.META_CONTEXT, messages.context_reply(context, known))
        if option is Option.SET_META_CONTEXT:
            self._selected = (number, selected)
        await self._reply(option, Reply.ACK)


def _covers(query: str, context: str) -> bool:
    """Whether a query of a list is a namespace that the context lies in."""
    return query.endswith(":") and context.startswith(query)
