/*
 * The end of pieces and requests: replies in the style that was negotiated.
 *
 * A structured reply to a READ has a chunk for each piece, in the order in which the pieces end. A simple reply has one
 * header for all. So the pieces of a long READ in the simple style are begun one after the other, with no other request
 * of the client under way. When one of them fails after the header is sent, only the end of the connection says so.
 */
#include <stdlib.h>
#include <string.h>

#include "nbd/internal.h"

#define ERROR_PAYLOAD 6u
#define HOLE_PAYLOAD 12u

static bool is_extended(const struct nbd_connection *connection)
{
    return connection->style == TAPFS_NBD_EXTENDED;
}

bool nbd_request_is_done(const struct nbd_request *request)
{
    bool moves = request->asked.command == CMD_READ || request->asked.command == CMD_WRITE;
    return request->pieces == 0 && (!moves || request->begun == request->asked.length);
}

static void request_free(struct nbd_request *request)
{
    struct nbd_connection *connection = request->connection;
    connection->requests--;
    nbd_let_go(connection, REQUEST_BYTES);
    nbd_touch(connection);
    free(request);
}

/* A client that cannot be answered would wait forever, unless its connection ends. */
static void give_up(struct nbd_connection *connection)
{
    connection->ended = true;
    nbd_drop_output(connection);
    nbd_touch(connection);
}

static void send_or_give_up(struct nbd_connection *connection, const void *bytes, size_t length)
{
    if (!nbd_send_copy(connection, bytes, length)) {
        give_up(connection);
    }
}

uint32_t nbd_metric_of(uint32_t command)
{
    switch (command) {
    case CMD_READ:
        return TAPFS_METRIC_READ;
    case CMD_WRITE:
        return TAPFS_METRIC_WRITE;
    case CMD_FLUSH:
        return TAPFS_METRIC_FLUSH;
    case CMD_TRIM:
        return TAPFS_METRIC_DISCARD;
    case CMD_WRITE_ZEROES:
        return TAPFS_METRIC_ZERO;
    default:
        return TAPFS_METRIC_OTHER;
    }
}

static void count(struct nbd_request *request, bool failed)
{
    tapfs_nbd *server = request->connection->loop->server;
    uint32_t kind = nbd_metric_of(request->asked.command);
    bool moves = kind == TAPFS_METRIC_READ || kind == TAPFS_METRIC_WRITE;

    metrics_end(&server->metrics, kind, request->since, moves ? request->asked.length : 0, failed);
    if (failed) {
        return;
    }
    if (request->asked.command == CMD_READ) {
        atomic_fetch_add_explicit(&server->reads, 1, memory_order_relaxed);
    } else if (request->asked.command == CMD_WRITE) {
        atomic_fetch_add_explicit(&server->writes, 1, memory_order_relaxed);
    }
}

void nbd_request_answer(struct nbd_request *request, int error)
{
    struct nbd_connection *connection = request->connection;
    uint8_t bytes[HEADER_MAX + ERROR_PAYLOAD];

    count(request, error != 0);
    error = nbd_error(error);
    if (connection->style == TAPFS_NBD_SIMPLE && request->answering) {
        if (error != 0) {
            give_up(connection);
        }
    } else if (connection->style == TAPFS_NBD_SIMPLE) {
        send_or_give_up(connection, bytes, nbd_simple_header(bytes, request->asked.cookie, error));
    } else if (!request->answering || error != 0) {
        size_t header = nbd_chunk_header(bytes, is_extended(connection), &request->asked, CHUNK_DONE,
                                         error != 0 ? CHUNK_ERROR : CHUNK_NONE, error != 0 ? ERROR_PAYLOAD : 0);
        if (error != 0) {
            nbd_put32(bytes + header, (uint32_t)error);
            nbd_put16(bytes + header + 4, 0);
            header += ERROR_PAYLOAD;
        }
        send_or_give_up(connection, bytes, header);
    }
    request_free(request);
}

static bool is_zero(const uint8_t *bytes, uint64_t length)
{
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, (size_t)length - 1) == 0;
}

/* Whether a piece of a READ can be told in few bytes: it is zeros, and its client takes chunks of any kind. */
static bool is_hole(const struct nbd_piece *piece)
{
    return piece->connection->style != TAPFS_NBD_SIMPLE && (piece->request->asked.flags & FLAG_DF) == 0 &&
           is_zero(piece->data, piece->length);
}

static void send_hole(const struct nbd_piece *piece, bool last)
{
    struct nbd_connection *connection = piece->connection;
    uint8_t bytes[HEADER_MAX + HOLE_PAYLOAD];
    size_t length = nbd_chunk_header(bytes, is_extended(connection), &piece->request->asked, last ? CHUNK_DONE : 0,
                                     CHUNK_OFFSET_HOLE, HOLE_PAYLOAD);

    nbd_put64(bytes + length, piece->offset);
    nbd_put32(bytes + length + 8, (uint32_t)piece->length);
    piece->request->answering = true;
    send_or_give_up(connection, bytes, length + HOLE_PAYLOAD);
}

/* The data of a piece of a READ, with its header right before the data. The piece is its own memory. */
static void send_data(struct nbd_piece *piece, bool last)
{
    struct nbd_request *request = piece->request;
    struct nbd_connection *connection = piece->connection;
    bool extended = is_extended(connection);
    uint8_t header[HEADER_MAX];
    size_t length = 0;

    if (connection->style != TAPFS_NBD_SIMPLE) {
        length = nbd_chunk_header(header, extended, &request->asked, last ? CHUNK_DONE : 0, CHUNK_OFFSET_DATA,
                                  piece->length + 8);
        nbd_put64(header + length, piece->offset);
        length += 8;
    } else if (!request->answering) {
        length = nbd_simple_header(header, request->asked.cookie, 0);
    }
    uint8_t *bytes = (uint8_t *)piece + offsetof(struct nbd_piece, data) - length;
    memcpy(bytes, header, length);
    request->answering = true;
    piece->output = (struct nbd_output){
        .bytes = bytes, .length = length + piece->length, .held = piece->held, .memory = piece,
        .spare = piece->spare};
    nbd_send(connection, &piece->output);
}

static size_t states_length(const struct nbd_states *states, bool extended)
{
    return extended ? 8 + 16 * states->count : 4 + 8 * states->count;
}

static size_t put_states(uint8_t *at, const struct nbd_states *states, bool extended)
{
    size_t length = extended ? 8 : 4;
    nbd_put32(at, states->context);
    if (extended) {
        nbd_put32(at + 4, (uint32_t)states->count);
    }
    for (size_t i = 0; i < states->count; i++) {
        const tapfs_nbd_state *state = &states->states[i];
        if (extended) {
            nbd_put64(at + length, state->length);
            nbd_put64(at + length + 8, state->state);
            length += 16;
        } else {
            nbd_put32(at + length, (uint32_t)state->length);
            nbd_put32(at + length + 4, (uint32_t)state->state);
            length += 8;
        }
    }
    return length;
}

/* A chunk for each context, the last of them the end of the answer. False: no memory. */
static bool send_states(const struct nbd_piece *piece)
{
    struct nbd_connection *connection = piece->connection;
    bool extended = is_extended(connection);
    size_t header = nbd_chunk_header_length(extended);

    for (const struct nbd_states *states = piece->states; states != NULL; states = states->next) {
        size_t payload = states_length(states, extended);
        struct nbd_output *output = malloc(sizeof *output + header + payload);
        if (output == NULL) {
            return false;
        }
        uint8_t *bytes = (uint8_t *)(output + 1);
        nbd_chunk_header(bytes, extended, &piece->request->asked, states->next == NULL ? CHUNK_DONE : 0,
                         extended ? CHUNK_BLOCK_STATUS_EXT : CHUNK_BLOCK_STATUS, payload);
        put_states(bytes + header, states, extended);
        *output = (struct nbd_output){.bytes = bytes, .length = header + payload, .memory = output,
                                      .held = sizeof *output + header + payload};
        nbd_hold(connection, output->held);
        nbd_send(connection, output);
        piece->request->answering = true;
    }
    return true;
}

static void piece_free(struct nbd_piece *piece)
{
    for (struct nbd_states *states = piece->states, *next; states != NULL; states = next) {
        next = states->next;
        free(states);
    }
    struct nbd_connection *connection = piece->connection;
    nbd_let_go(connection, piece->held);
    nbd_memory_give(connection->loop, piece, piece->spare);
}

/* FUA is allowed on every command, and means something to those that change the disk. */
static bool wants_sync(const struct nbd_request *request)
{
    uint16_t command = request->asked.command;
    bool changes = command == CMD_WRITE || command == CMD_TRIM || command == CMD_WRITE_ZEROES;
    return changes && (request->asked.flags & FLAG_FUA) != 0 && !request->synced;
}

struct nbd_request *nbd_piece_ended(struct nbd_piece *piece, int error)
{
    struct nbd_request *request = piece->request;

    request->pieces--;
    if (request->error == 0) {
        request->error = error;
    }
    bool done = nbd_request_is_done(request);
    if (piece->kind == TAPFS_NBD_STATUS && request->error == 0 && !send_states(piece)) {
        request->error = ENOMEM;
    }
    if (piece->kind == TAPFS_NBD_READ && request->error == 0 && !is_hole(piece)) {
        send_data(piece, done);
    } else {
        if (piece->kind == TAPFS_NBD_READ && request->error == 0) {
            send_hole(piece, done);
        }
        piece_free(piece);
    }
    if (!done) {
        nbd_touch(request->connection);
    } else if (request->error == 0 && wants_sync(request)) {
        return request;
    } else {
        nbd_request_answer(request, request->error);
    }
    return NULL;
}
