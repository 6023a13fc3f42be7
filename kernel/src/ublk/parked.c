/* Requests that wait for the owner's threads, as those see them: taken, resumed, completed. */
#include "ublk/internal.h"

static struct ublk_request *request_of(struct parked_entry *entry)
{
    return (struct ublk_request *)(void *)entry;
}

static bool moves_data(const struct ublk_request *request)
{
    return request->kind == TAPFS_UBLK_READ || request->kind == TAPFS_UBLK_WRITE;
}

static uint32_t queue_of(const struct ublk_request *request)
{
    if (request->kind == TAPFS_UBLK_WRITE && request->outcome.status == TAPFS_RESERVE) {
        return TAPFS_WRITES;
    }
    if (moves_data(request)) {
        return TAPFS_MOVES;
    }
    return request->kind == TAPFS_UBLK_SYNC ? TAPFS_SYNCS : TAPFS_OTHERS;
}

bool ublk_park(struct ublk_request *request)
{
    request->goes_on = false;
    if (!park_put(&request->queue->server->park, queue_of(request), &request->entry)) {
        return false;
    }
    ublk_count(&request->queue->counters.parked, 1);
    return true;
}

void ublk_park_stop(tapfs_ublk *server)
{
    for (struct parked_entry *left = park_stop(&server->park), *next; left != NULL; left = next) {
        next = left->next;
        ublk_give_back(request_of(left), ESHUTDOWN);
    }
}

static void describe(const struct parked_entry *entry, tapfs_parked *parked)
{
    const struct ublk_request *request = (const void *)entry;
    *parked = (tapfs_parked){
        .ticket = entry->ticket,
        .offset = request->offset + request->done,
        .length = request->length - request->done,
        .data = request->kind == TAPFS_UBLK_WRITE ? request->data + request->done : NULL,
        .request = request->kind,
        .tried = request->tried,
        .outcome = request->outcome,
    };
}

size_t tapfs_ublk_next_parked(tapfs_ublk *server, uint32_t queue, tapfs_parked *parked, size_t capacity)
{
    return park_next_described(&server->park, queue, parked, capacity, describe);
}

/* As far as goes without waiting: the owner's threads are few, and others wait for their maps. */
static void move(struct ublk_request *request)
{
    uint64_t at = request->offset + request->done, left = request->length - request->done;

    if (request->kind == TAPFS_UBLK_READ) {
        tapfs_read(request->disk, request->data + request->done, at, left, TAPFS_NOWAIT, &request->outcome);
    } else {
        tapfs_write(request->disk, request->data + request->done, at, left, TAPFS_NOWAIT, &request->outcome);
    }
    request->done += request->outcome.done;
}

int tapfs_ublk_resume_parked(tapfs_ublk *server, uint64_t ticket, tapfs_parked *parked)
{
    /* Nobody but the thread that took it touches it. */
    struct ublk_request *request = request_of(park_taken(&server->park, ticket, false));
    if (request == NULL || !moves_data(request)) {
        return 0;
    }
    move(request);
    if (request->outcome.status != TAPFS_DONE && request->outcome.status != TAPFS_AGAIN) {
        describe(&request->entry, parked);
        return 1;
    }
    park_taken(&server->park, ticket, true);
    request->goes_on = request->outcome.status == TAPFS_AGAIN;
    ublk_give_back(request, 0);
    return 0;
}

void tapfs_ublk_complete(tapfs_ublk *server, uint64_t ticket, int error)
{
    struct ublk_request *request = request_of(park_taken(&server->park, ticket, true));
    if (request != NULL) {
        /* A READ that is not moved to its end has nothing to be answered with. */
        ublk_give_back(request, error == 0 && request->kind == TAPFS_UBLK_READ ? EIO : error);
    }
}
