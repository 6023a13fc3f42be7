/*
 * Pieces of requests: moved by the mover of their loop, or parked for the owner's threads and given back by those.
 *
 * A READ or WRITE goes to the mover, which moves at once what the host has in memory. What it lacks is parked. All other
 * kinds are parked at once. Whoever has a piece in hand gives it back to its loop, which alone knows requests.
 */
#include <stdlib.h>
#include <sys/eventfd.h>

#include "nbd/internal.h"

struct nbd_piece *nbd_piece_new(struct nbd_request *request, uint32_t kind, uint64_t offset, uint64_t length,
                                size_t data_bytes)
{
    bool spare;
    struct nbd_piece *piece = nbd_memory_take(request->connection->loop, sizeof *piece + data_bytes, &spare);
    if (piece == NULL) {
        return NULL;
    }
    /* Not the data, which would cost as much as moving it. */
    *piece = (struct nbd_piece){
        .request = request,
        .tried = request->since,
        .connection = request->connection,
        .kind = kind,
        .offset = offset,
        .length = length,
        .held = sizeof *piece + data_bytes,
        .spare = spare,
        .states_end = &piece->states,
        .whole = {.iov_base = piece->data, .iov_len = length},
        .move = {
            .offset = offset,
            .length = length,
            .parts = &piece->whole,
            .part_count = 1,
            .writing = kind == TAPFS_NBD_WRITE,
            .context = piece,
        },
    };
    request->pieces++;
    nbd_hold(request->connection, piece->held);
    return piece;
}

/* ---- in any thread */

void nbd_piece_return(struct nbd_piece *piece)
{
    struct nbd_loop *loop = piece->connection->loop;

    pthread_mutex_lock(&loop->lock);
    bool first = loop->returned == NULL;
    piece->next = loop->returned;
    loop->returned = piece;
    if (first) {
        /* Under the lock: once the loop has the last piece it may end. */
        eventfd_write(loop->wake_fd, 1);
    }
    pthread_mutex_unlock(&loop->lock);
}

static void give_back(struct nbd_piece *piece, int error)
{
    piece->error = error;
    piece->goes_on = false;
    nbd_piece_return(piece);
}

void nbd_park_stop(tapfs_nbd *server)
{
    for (struct parked_entry *left = park_stop(&server->park), *next; left != NULL; left = next) {
        next = left->next;
        give_back((struct nbd_piece *)(void *)left, ESHUTDOWN);
    }
}

/* ---- in the loop's thread */

static uint32_t queue_of(const struct nbd_piece *piece)
{
    switch (piece->kind) {
    case TAPFS_NBD_WRITE:
        return piece->move.outcome.status == TAPFS_RESERVE ? TAPFS_WRITES : TAPFS_MOVES;
    case TAPFS_NBD_READ:
    case TAPFS_NBD_STATUS:
        return TAPFS_MOVES;
    case TAPFS_NBD_SYNC:
        return TAPFS_SYNCS;
    default:
        return TAPFS_OTHERS;
    }
}

/* False: the server stops, and the piece stays the caller's. */
static bool park(struct nbd_piece *piece)
{
    tapfs_nbd *server = piece->connection->loop->server;

    /* Before a thread can take it: who has taken a request finds it counted. */
    atomic_fetch_add(&server->parked, 1);
    if (!park_put(&server->park, queue_of(piece), &piece->entry)) {
        atomic_fetch_sub(&server->parked, 1);
        return false;
    }
    return true;
}

/* The next piece of its request if this one was the last before a SYNC; NULL: there is nothing to begin. */
static struct nbd_piece *ended(struct nbd_piece *piece, int error)
{
    struct nbd_loop *loop = piece->connection->loop;
    struct nbd_request *request = nbd_piece_ended(piece, error);
    if (request == NULL) {
        loop->under_way--;
        return NULL;
    }
    request->synced = true;
    struct nbd_piece *sync = nbd_piece_new(request, TAPFS_NBD_SYNC, 0, 0, 0);
    if (sync == NULL) {
        loop->under_way--;
        nbd_request_answer(request, ENOMEM);
    }
    return sync;
}

static void park_or_fail(struct nbd_piece *piece)
{
    /* Its SYNC would be refused like the piece, so this ends. */
    while (piece != NULL && !park(piece)) {
        piece = ended(piece, ESHUTDOWN);
    }
}

static void moved(struct nbd_piece *piece)
{
    park_or_fail(piece->move.outcome.status == TAPFS_DONE ? ended(piece, 0) : piece);
}

static void go(struct nbd_piece *piece)
{
    if (piece->kind != TAPFS_NBD_READ && piece->kind != TAPFS_NBD_WRITE) {
        park_or_fail(piece);
        return;
    }
    struct nbd_loop *loop = piece->connection->loop;
    if (mover_begin(loop->mover, &piece->move)) {
        moved(piece);
    } else {
        atomic_fetch_add_explicit(&loop->server->waited, 1, memory_order_relaxed);
    }
}

void nbd_piece_begin(struct nbd_piece *piece)
{
    piece->connection->loop->under_way++;
    go(piece);
}

void nbd_pieces_moved(struct nbd_loop *loop)
{
    for (struct move *move = mover_ended(loop->mover), *next; move != NULL; move = next) {
        next = move->next;
        moved(move->context);
    }
}

void nbd_pieces_returned(struct nbd_piece *returned)
{
    for (struct nbd_piece *piece = returned, *next; piece != NULL; piece = next) {
        next = piece->next;
        if (piece->goes_on) {
            piece->goes_on = false;
            piece->tried = rate_limit_now();
            go(piece);
        } else {
            park_or_fail(ended(piece, piece->error));
        }
    }
}
