/*
 * Bytes of a client become requests, and requests become pieces.
 *
 * A request is looked at before anything is done for it: its range lies inside the disk, its length is one that the
 * server takes, its flags are known. A payload that is not wanted is read and dropped. After a message that is none the
 * stream cannot be read any more, so the connection ends.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "nbd/internal.h"

/* So many times bytes are taken before other clients have their turn. */
#define TURNS 8

static bool has_room(const struct nbd_connection *connection)
{
    return connection->held < CONNECTION_BYTES && connection->requests < CONNECTION_REQUESTS;
}

/* Whether something more may be begun for a client now. If it is the rate limit that forbids it, its loop looks again. */
static bool may_begin(struct nbd_connection *connection)
{
    struct nbd_loop *loop = connection->loop;

    if (!has_room(connection)) {
        return false;
    }
    uint64_t delay = rate_limit_delay(&loop->server->limit);
    if (delay == 0 || loop->stop_at != 0) {
        return true;
    }
    uint64_t until = rate_limit_now() + delay;
    loop->limited_until = loop->limited_until == 0 ? until : minimum(loop->limited_until, until);
    return false;
}

static struct nbd_request *request_new(struct nbd_connection *connection, const tapfs_nbd_asked *asked,
                                       uint32_t contexts)
{
    struct nbd_request *request = malloc(sizeof *request);
    if (request != NULL) {
        *request = (struct nbd_request){
            .connection = connection,
            .asked = *asked,
            .contexts = contexts,
            .since = metrics_begin(nbd_metric_of(asked->command), asked->offset, asked->length),
        };
        connection->requests++;
        nbd_hold(connection, REQUEST_BYTES);
    }
    return request;
}

/* ---- what is asked for */

static bool changes(uint16_t command)
{
    return command == CMD_WRITE || command == CMD_TRIM || command == CMD_WRITE_ZEROES;
}

/* Whether it may be done while the disk is to be had LATER. */
static bool is_early(const tapfs_nbd_asked *asked)
{
    bool first = asked->length <= FIRST_PAGE && asked->offset <= FIRST_PAGE - asked->length;
    return asked->command == CMD_FLUSH || asked->command == CMD_DISC || (asked->command == CMD_READ && first);
}

static uint16_t allowed_flags(uint16_t command)
{
    switch (command) {
    case CMD_READ:
        return FLAG_FUA | FLAG_DF;
    case CMD_WRITE:
        return FLAG_FUA | FLAG_PAYLOAD_LEN;
    case CMD_WRITE_ZEROES:
        return FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO;
    case CMD_BLOCK_STATUS:
        return FLAG_FUA | FLAG_REQ_ONE;
    default:
        return FLAG_FUA;
    }
}

/* 0, or the error that answers a request of this kind. */
static int judge(const tapfs_nbd *server, const tapfs_nbd_asked *asked, uint32_t contexts)
{

    if (asked->command > CMD_BLOCK_STATUS || (asked->flags & ~allowed_flags(asked->command)) != 0) {
        return EINVAL;
    }
    if (asked->command == CMD_FLUSH) {
        return 0;
    }
    if (changes(asked->command) && server->access == TAPFS_NBD_READ_ONLY) {
        return EPERM;
    }
    if (asked->offset > server->size || asked->length > server->size - asked->offset) {
        return asked->command == CMD_WRITE || asked->command == CMD_WRITE_ZEROES ? ENOSPC : EINVAL;
    }
    if (asked->command == CMD_READ && asked->length > TAPFS_NBD_REQUEST_MAX) {
        return EINVAL;
    }
    if (asked->command == CMD_READ && (asked->flags & FLAG_DF) != 0 && asked->length > PIECE_BYTES) {
        return EOVERFLOW;
    }
    if (asked->command == CMD_BLOCK_STATUS && (contexts == 0 || asked->length == 0)) {
        return EINVAL;
    }
    if ((asked->flags & FLAG_NO_HOLE) != 0 && (asked->flags & FLAG_FAST_ZERO) != 0) {
        return EOPNOTSUPP; /* zeros that take space are written */
    }
    return 0;
}

static uint32_t kind_of(const tapfs_nbd_asked *asked)
{
    switch (asked->command) {
    case CMD_FLUSH:
        return TAPFS_NBD_SYNC;
    case CMD_TRIM:
        return TAPFS_NBD_DISCARD;
    case CMD_CACHE:
        return TAPFS_NBD_CACHE;
    case CMD_BLOCK_STATUS:
        return TAPFS_NBD_STATUS;
    default:
        return (asked->flags & FLAG_NO_HOLE) != 0     ? TAPFS_NBD_FILL
               : (asked->flags & FLAG_FAST_ZERO) != 0 ? TAPFS_NBD_FAST_ZERO
                                                      : TAPFS_NBD_ZERO;
    }
}

/*
 * A BLOCK_STATUS may have a payload, in the extended style: the length that it asks about, and some of the contexts that
 * were selected. Then take both from there. The bytes of the payload, 0 if there is none that makes sense (judge refuses
 * the flag), or negative if more must be read first.
 */
static int narrow(const struct nbd_connection *connection, const uint8_t *bytes, size_t have, tapfs_nbd_asked *asked,
                  uint32_t *contexts)
{
    bool named = connection->style == TAPFS_NBD_EXTENDED && asked->command == CMD_BLOCK_STATUS &&
                 (asked->flags & FLAG_PAYLOAD_LEN) != 0;

    *contexts = connection->contexts;
    if (!named || asked->length < 8 || asked->length > 8 + 4 * CONTEXTS_MAX || asked->length % 4 != 0) {
        return 0;
    }
    if (have < asked->length) {
        return -1;
    }
    uint32_t wanted = 0;
    bool senseless = asked->length == 8;
    for (size_t at = 8; at < asked->length; at += 4) {
        uint32_t context = nbd_get32(bytes + at);
        uint32_t bit = context < CONTEXTS_MAX ? UINT32_C(1) << context : 0;
        senseless = senseless || (connection->contexts & bit) == 0 || (wanted & bit) != 0;
        wanted |= bit;
    }
    int payload = (int)asked->length;
    asked->flags &= (uint16_t)~FLAG_PAYLOAD_LEN;
    asked->length = nbd_get64(bytes);
    *contexts = senseless ? 0 : wanted;
    return payload;
}

/* ---- requests */

/* Begin a request that the owner's threads do. */
static void begin_parked(struct nbd_request *request)
{
    struct nbd_connection *connection = request->connection;
    const tapfs_nbd_asked *asked = &request->asked;
    bool flush = asked->command == CMD_FLUSH;

    if (flush ? connection->loop->server->access != TAPFS_NBD_WRITABLE : asked->length == 0) {
        nbd_request_answer(request, 0);
        return;
    }
    struct nbd_piece *piece =
        nbd_piece_new(request, kind_of(asked), flush ? 0 : asked->offset, flush ? 0 : asked->length, 0);
    if (piece == NULL) {
        nbd_request_answer(request, ENOMEM);
        return;
    }
    if (piece->kind == TAPFS_NBD_STATUS) {
        /* Its states are to come. */
        size_t states = (size_t)__builtin_popcount(request->contexts) * STATES_MAX * sizeof(tapfs_nbd_state);
        piece->held += states;
        nbd_hold(connection, states);
    }
    rate_limit_charge(&connection->loop->server->limit, 0);
    nbd_piece_begin(piece);
}

/* Begin the pieces of a READ that there is room for. It stays `current` until all are begun. */
static void go_on_reading(struct nbd_connection *connection)
{
    struct nbd_request *request = connection->current;
    const tapfs_nbd_asked *asked = &request->asked;
    bool one_by_one = connection->style == TAPFS_NBD_SIMPLE && asked->length > PIECE_BYTES;

    while (request->begun < asked->length) {
        bool alone = connection->requests == 1 && request->pieces == 0;
        if ((one_by_one && (!alone || connection->output != NULL)) || !may_begin(connection)) {
            return;
        }
        uint64_t length = minimum(asked->length - request->begun, PIECE_BYTES);
        struct nbd_piece *piece =
            request->error != 0
                ? NULL
                : nbd_piece_new(request, TAPFS_NBD_READ, asked->offset + request->begun, length, (size_t)length);
        if (piece == NULL) {
            /* No more pieces: the answer is the error. */
            request->error = request->error != 0 ? request->error : ENOMEM;
            request->asked.length = request->begun;
            break;
        }
        request->begun += length;
        rate_limit_charge(&connection->loop->server->limit, length);
        if (request->begun == asked->length) {
            connection->current = NULL; /* it may be gone when its last piece has begun */
            nbd_piece_begin(piece);
            return;
        }
        nbd_piece_begin(piece);
    }
    connection->current = NULL;
    if (nbd_request_is_done(request)) {
        nbd_request_answer(request, request->error);
    }
}

/* The next piece of a WRITE, for data that is coming. */
static void begin_filling(struct nbd_connection *connection)
{
    struct nbd_request *request = connection->current;
    uint64_t length = minimum(request->asked.length - request->begun, PIECE_BYTES);

    connection->filling = nbd_piece_new(request, TAPFS_NBD_WRITE, request->asked.offset + request->begun, length,
                                        (size_t)length);
    connection->filled = 0;
    rate_limit_charge(&connection->loop->server->limit, length);
    if (connection->filling == NULL) {
        request->error = request->error != 0 ? request->error : ENOMEM;
        connection->skipping = request->asked.length - request->begun;
        request->asked.length = request->begun;
        connection->current = NULL;
        if (nbd_request_is_done(request)) {
            nbd_request_answer(request, request->error);
        }
    }
}

/* The data of a piece is there. */
static void filled(struct nbd_connection *connection)
{
    struct nbd_piece *piece = connection->filling;
    struct nbd_request *request = connection->current;

    connection->filling = NULL;
    request->begun += piece->length;
    if (request->begun == request->asked.length) {
        connection->current = NULL;
    }
    nbd_piece_begin(piece);
}

/* A request whose header was read. False: the stream cannot be read any more. */
static bool take(struct nbd_connection *connection, const tapfs_nbd_asked *asked, uint32_t contexts)
{
    bool extended = connection->style == TAPFS_NBD_EXTENDED;
    /* QEMU 10 sends extended WRITEs without the flag. */
    bool payload = asked->command == CMD_WRITE || (extended && (asked->flags & FLAG_PAYLOAD_LEN) != 0);

    if (asked->command == CMD_DISC) {
        connection->ended = true;
        return true;
    }
    if (payload && asked->length > TAPFS_NBD_REQUEST_MAX) {
        return false;
    }
    struct nbd_request *request = request_new(connection, asked, contexts);
    if (request == NULL) {
        return false;
    }
    int error = judge(connection->loop->server, asked, contexts);
    if (error != 0) {
        connection->skipping = payload ? asked->length : 0;
        nbd_request_answer(request, error);
    } else if (asked->command != CMD_READ && asked->command != CMD_WRITE) {
        begin_parked(request);
    } else if (asked->length == 0) {
        nbd_request_answer(request, 0);
    } else {
        connection->current = request;
    }
    return true;
}

/* ---- bytes */

/* Take `length` bytes of a payload, or less; how many. */
static size_t take_payload(struct nbd_connection *connection, const uint8_t *bytes, size_t length)
{
    if (connection->skipping > 0) {
        size_t skipped = minimum(length, connection->skipping);
        connection->skipping -= skipped;
        return skipped;
    }
    size_t part = minimum(length, connection->filling->length - connection->filled);
    memcpy(connection->filling->data + connection->filled, bytes, part);
    connection->filled += part;
    return part;
}

enum nbd_parsed nbd_parse(struct nbd_connection *connection)
{
    tapfs_nbd *server = connection->loop->server;

    for (;;) {
        if (atomic_load_explicit(&server->paused, memory_order_relaxed)) {
            return PARSED_NO_ROOM;
        }
        if (connection->current != NULL && connection->current->asked.command == CMD_READ) {
            go_on_reading(connection);
            if (connection->current != NULL) {
                return PARSED_NO_ROOM;
            }
            continue;
        }
        if (connection->filling != NULL && connection->filled == connection->filling->length) {
            filled(connection);
            continue;
        }
        if (connection->ended) {
            return PARSED_ALL;
        }
        size_t have = connection->input_end - connection->input_start;
        if (connection->current != NULL && connection->filling == NULL) {
            if (!may_begin(connection)) {
                return PARSED_NO_ROOM;
            }
            begin_filling(connection);
            continue;
        }
        if (connection->skipping > 0 || connection->filling != NULL) {
            if (have == 0) {
                return PARSED_ALL;
            }
            connection->input_start += take_payload(connection, connection->input + connection->input_start, have);
            continue;
        }
        if (!may_begin(connection)) {
            return PARSED_NO_ROOM;
        }
        tapfs_nbd_asked asked;
        uint32_t contexts;
        int header = tapfs_nbd_decode(connection->input + connection->input_start, have,
                                      connection->style == TAPFS_NBD_EXTENDED, &asked);
        if (header == 0) {
            return PARSED_ALL;
        }
        if (header < 0) {
            return PARSED_NONSENSE;
        }
        if (server->access == TAPFS_NBD_LATER && !is_early(&asked)) {
            atomic_store(&server->waits, true);
            eventfd_write(server->ended_fd, 1);
            return PARSED_NO_ROOM;
        }
        int payload = narrow(connection, connection->input + connection->input_start + header, have - (size_t)header,
                             &asked, &contexts);
        if (payload < 0) {
            return PARSED_ALL;
        }
        connection->input_start += (size_t)(header + payload);
        if (!take(connection, &asked, contexts)) {
            return PARSED_NONSENSE;
        }
    }
}

/* Bytes from the socket, into the piece that waits for them where these are many: as recv. */
static ssize_t receive(struct nbd_connection *connection, size_t *room)
{
    struct nbd_piece *piece = connection->filling;
    bool empty = connection->input_start == connection->input_end;

    if (empty && piece != NULL && piece->length - connection->filled >= DIRECT_BYTES) {
        *room = (size_t)(piece->length - connection->filled);
        ssize_t got = recv(connection->fd, piece->data + connection->filled, *room, MSG_DONTWAIT);
        connection->filled += got > 0 ? (size_t)got : 0;
        return got;
    }
    if (connection->input_start > 0) {
        memmove(connection->input, connection->input + connection->input_start,
                connection->input_end - connection->input_start);
        connection->input_end -= connection->input_start;
        connection->input_start = 0;
    }
    *room = INPUT_BYTES - connection->input_end;
    ssize_t got = recv(connection->fd, connection->input + connection->input_end, *room, MSG_DONTWAIT);
    connection->input_end += got > 0 ? (size_t)got : 0;
    return got;
}

bool nbd_input(struct nbd_connection *connection)
{
    for (int turn = 0; turn < TURNS; turn++) {
        enum nbd_parsed parsed = nbd_parse(connection);
        if (parsed == PARSED_NONSENSE) {
            return false;
        }
        if (parsed == PARSED_NO_ROOM || connection->ended) {
            return true;
        }
        size_t room;
        ssize_t got = receive(connection, &room);
        if (got == 0) {
            /* In the middle of a request the client is gone; after one it may have said all that it had to say. */
            connection->ended = true;
            return connection->filling == NULL && connection->skipping == 0 &&
                   connection->input_start == connection->input_end;
        }
        if (got < 0) {
            return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
        }
        if ((size_t)got < room) {
            return nbd_parse(connection) != PARSED_NONSENSE;
        }
    }
    return true;
}
