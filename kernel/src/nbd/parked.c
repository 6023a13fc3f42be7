/* Parked pieces as the owner's threads see them: taken, resumed, completed. */
#include <stdlib.h>
#include <string.h>

#include "nbd/internal.h"

static struct nbd_piece *piece_of(struct parked_entry *entry)
{
    return (struct nbd_piece *)(void *)entry;
}

/* Nobody but the thread that took it, which asks this, removes it. */
static struct nbd_piece *taken(tapfs_nbd *server, uint64_t ticket)
{
    return piece_of(park_taken(&server->park, ticket, false));
}

static void describe(const struct parked_entry *entry, tapfs_parked *parked)
{
    const struct nbd_piece *piece = (const void *)entry;
    uint64_t done = piece->move.outcome.done;
    *parked = (tapfs_parked){
        .ticket = entry->ticket,
        .offset = piece->offset + done,
        .length = piece->length - done,
        .data = piece->kind == TAPFS_NBD_WRITE ? piece->data + done : NULL,
        .request = piece->kind,
        .tried = piece->tried,
        .outcome = piece->move.outcome,
    };
}

size_t tapfs_nbd_next_parked(tapfs_nbd *server, uint32_t queue, tapfs_parked *parked, size_t capacity)
{
    return park_next_described(&server->park, queue, parked, capacity, describe);
}

/* As far as goes without waiting: the owner's threads are few, and others wait for their maps. */
static void move(tapfs_nbd *server, struct nbd_piece *piece)
{
    tapfs_outcome *outcome = &piece->move.outcome;
    uint64_t done = outcome->done, at = piece->offset + done, left = piece->length - done;

    if (piece->kind == TAPFS_NBD_READ) {
        tapfs_read(server->disk, piece->data + done, at, left, TAPFS_NOWAIT, outcome);
    } else {
        tapfs_write(server->disk, piece->data + done, at, left, TAPFS_NOWAIT, outcome);
    }
    outcome->done += done;
}

int tapfs_nbd_resume_parked(tapfs_nbd *server, uint64_t ticket, tapfs_parked *parked)
{
    struct nbd_piece *piece = taken(server, ticket);
    if (piece == NULL || (piece->kind != TAPFS_NBD_READ && piece->kind != TAPFS_NBD_WRITE)) {
        return 0;
    }
    move(server, piece);
    int32_t status = piece->move.outcome.status;
    if (status != TAPFS_DONE && status != TAPFS_AGAIN) {
        describe(&piece->entry, parked);
        return 1;
    }
    park_taken(&server->park, ticket, true);
    piece->error = 0;
    piece->goes_on = status == TAPFS_AGAIN;
    nbd_piece_return(piece);
    return 0;
}

int tapfs_nbd_given_up(tapfs_nbd *server, uint64_t ticket)
{
    const struct nbd_piece *piece = taken(server, ticket);
    return piece == NULL || atomic_load(&piece->connection->gone) || atomic_load(&server->stopping);
}

uint32_t tapfs_nbd_wanted(tapfs_nbd *server, uint64_t ticket, int *single)
{
    const struct nbd_piece *piece = taken(server, ticket);
    if (piece == NULL || piece->kind != TAPFS_NBD_STATUS) {
        return 0;
    }
    *single = (piece->request->asked.flags & FLAG_REQ_ONE) != 0;
    return piece->request->contexts;
}

int tapfs_nbd_add_states(tapfs_nbd *server, uint64_t ticket, uint32_t context, const tapfs_nbd_state *states,
                         size_t count)
{
    struct nbd_piece *piece = taken(server, ticket);
    if (piece == NULL || piece->kind != TAPFS_NBD_STATUS || count == 0) {
        return 0;
    }
    count = minimum(count, STATES_MAX);
    struct nbd_states *kept = malloc(sizeof *kept + count * sizeof *states);
    if (kept == NULL) {
        return -ENOMEM;
    }
    kept->next = NULL;
    kept->context = context;
    kept->count = count;
    memcpy(kept->states, states, count * sizeof *states);
    *piece->states_end = kept;
    piece->states_end = &kept->next;
    return 0;
}

void tapfs_nbd_complete(tapfs_nbd *server, uint64_t ticket, int error)
{
    struct nbd_piece *piece = piece_of(park_taken(&server->park, ticket, true));
    if (piece != NULL) {
        /* Only a READ that was moved to its end has an answer, and resume gives that; a STATUS needs its states. */
        bool unanswered = piece->kind == TAPFS_NBD_READ || (piece->kind == TAPFS_NBD_STATUS && piece->states == NULL);
        piece->error = error == 0 && unanswered ? EIO : error;
        piece->goes_on = false;
        nbd_piece_return(piece);
    }
}
