/* Parked requests as the owner's threads see them: taken, resumed, completed. */
#include <errno.h>

#include "fuse/internal.h"

static struct fuse_call *call_of(struct parked_entry *entry)
{
    return (struct fuse_call *)(void *)entry;
}

static void describe(const struct parked_entry *entry, tapfs_parked *parked)
{
    const struct fuse_call *call = (const void *)entry;
    const struct fuse_place place = fuse_place_of(call);
    *parked = (tapfs_parked){
        .ticket = entry->ticket,
        .offset = place.offset,
        .length = place.length,
        .data = call->request == TAPFS_FUSE_WRITE ? call->buffer->memory + BUFFER_DATA_AT + call->done : NULL,
        .request = call->request,
        .outcome = call->outcome,
    };
}

size_t tapfs_fuse_next_parked(tapfs_fuse *server, uint32_t queue, tapfs_parked *parked, size_t capacity)
{
    return park_next_described(&server->park, queue, parked, capacity, describe);
}

static bool moves_data(const struct fuse_call *call)
{
    return call->request == TAPFS_FUSE_READ || call->request == TAPFS_FUSE_WRITE;
}

/* As far as goes without waiting: the owner's threads are few, and others wait for their maps. */
static enum fuse_fate move(tapfs_fuse *server, struct fuse_call *call)
{
    bool never;
    if (call->buffer == NULL) {
        call->buffer = fuse_buffer_for_read(server, &never);
    }
    return call->buffer == NULL ? FATE_WAITS : fuse_move_at_once(server, call);
}

/* After the stop there is no other thread to wait for the host. What lacks anything then fails like what is parked. */
static void finish_stopped(tapfs_fuse *server, struct fuse_call *call)
{
    int error = call->buffer == NULL ? ENOMEM : fuse_move_waiting(server, call) == FATE_MOVED ? 0 : EIO;
    fuse_end(server, call, error, 0);
}

int tapfs_fuse_resume_parked(tapfs_fuse *server, uint64_t ticket, tapfs_parked *parked)
{
    /* Nobody but the thread that took it touches it. */
    struct fuse_call *call = call_of(park_taken(&server->park, ticket, false));
    if (call == NULL || !moves_data(call)) {
        return 0;
    }
    enum fuse_fate fate = move(server, call);
    switch (fate) {
    case FATE_LACKS:
        describe(&call->entry, parked);
        return 1;
    case FATE_MOVED:
        park_taken(&server->park, ticket, true);
        fuse_end(server, call, 0, 0);
        return 0;
    default:
        park_taken(&server->park, ticket, true);
        if (!fuse_moves_add(server, call)) {
            finish_stopped(server, call);
        }
        return 0;
    }
}

static void interrupt(struct parked_entry *entry, void *unique)
{
    struct fuse_call *call = call_of(entry);
    if (call->unique == *(const uint64_t *)unique) {
        atomic_store(&call->interrupted, true);
    }
}

void fuse_interrupt(tapfs_fuse *server, uint64_t unique)
{
    park_each(&server->park, interrupt, &unique);
}

int tapfs_fuse_given_up(tapfs_fuse *server, uint64_t ticket)
{
    /* Nobody but the thread that took it, which asks this, removes it. */
    struct fuse_call *call = call_of(park_taken(&server->park, ticket, false));
    return call == NULL || atomic_load(&call->interrupted) || atomic_load(&server->stopping);
}

void tapfs_fuse_complete(tapfs_fuse *server, uint64_t ticket, int error, uint64_t found)
{
    struct fuse_call *call = call_of(park_taken(&server->park, ticket, true));
    if (call != NULL) {
        /* Only a READ that was moved to its end has an answer, and resume gives that. */
        bool unread = error == 0 && call->request == TAPFS_FUSE_READ;
        fuse_end(server, call, unread ? EIO : error, found);
    }
}
