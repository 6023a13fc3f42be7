/* The two ends of a request of a data node: an answer to the kernel, or the park. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "fuse/internal.h"

void fuse_reply(int fd, uint64_t unique, int error, const void *payload, size_t length)
{
    struct fuse_out_header header = {
        .len = (uint32_t)(sizeof header + (error != 0 ? 0 : length)),
        .error = -error,
        .unique = unique,
    };
    struct iovec vector[2] = {
        {.iov_base = &header, .iov_len = sizeof header},
        /* struct iovec serves readers too, hence not const. */
        {.iov_base = (void *)(uintptr_t)payload, .iov_len = length},
    };
    ssize_t written;
    do {
        written = writev(fd, vector, error != 0 || length == 0 ? 1 : 2);
    } while (written < 0 && errno == EINTR);
}

void fuse_signal_ended(tapfs_fuse *server)
{
    uint64_t one = 1;
    ssize_t written = write(server->ended_fd, &one, sizeof one);
    (void)written; /* full: it is readable already */
}

/* Note a write that is done, before it is answered. */
static void note_write(tapfs_fuse *server)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    atomic_store(&server->last_write, (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
    atomic_fetch_add_explicit(&server->writes, 1, memory_order_relaxed);
}

uint32_t fuse_metric_of(uint32_t request)
{
    switch (request) {
    case TAPFS_FUSE_READ:
        return TAPFS_METRIC_READ;
    case TAPFS_FUSE_WRITE:
        return TAPFS_METRIC_WRITE;
    case TAPFS_FUSE_SYNC:
        return TAPFS_METRIC_FLUSH;
    case TAPFS_FUSE_ZERO:
        return TAPFS_METRIC_ZERO;
    default:
        return TAPFS_METRIC_OTHER;
    }
}

void fuse_answer(tapfs_fuse *server, const struct fuse_call *call, int error, uint64_t found)
{
    bool moves = call->request == TAPFS_FUSE_READ || call->request == TAPFS_FUSE_WRITE;

    metrics_end(&server->metrics, fuse_metric_of(call->request), call->since, moves ? call->length : 0, error != 0);
    if (error != 0) {
        fuse_reply(call->fd, call->unique, error, NULL, 0);
    } else if (call->request == TAPFS_FUSE_READ) {
        atomic_fetch_add_explicit(&server->reads, 1, memory_order_relaxed);
        fuse_reply(call->fd, call->unique, 0, call->buffer->memory + BUFFER_DATA_AT, call->length);
    } else if (call->request == TAPFS_FUSE_WRITE) {
        struct fuse_write_out out = {.size = (uint32_t)call->length};
        note_write(server);
        fuse_reply(call->fd, call->unique, 0, &out, sizeof out);
    } else if (call->request == TAPFS_FUSE_SEEK_DATA || call->request == TAPFS_FUSE_SEEK_HOLE) {
        struct fuse_lseek_out out = {.offset = found - call->node->start};
        fuse_reply(call->fd, call->unique, 0, &out, sizeof out);
    } else if (call->written) {
        struct fuse_write_out out = {.size = (uint32_t)call->length};
        fuse_reply(call->fd, call->unique, 0, &out, sizeof out);
    } else {
        fuse_reply(call->fd, call->unique, 0, NULL, 0);
    }
}

/* A WRITE that is done and not answered becomes a SYNC. */
static void make_durable(tapfs_fuse *server, struct fuse_call *call)
{
    metrics_end(&server->metrics, TAPFS_METRIC_WRITE, call->since, call->length, false);
    note_write(server);
    if (call->buffer != NULL) {
        fuse_buffer_return(server, call->buffer);
        call->buffer = NULL;
    }
    call->request = TAPFS_FUSE_SYNC;
    call->durable = false;
    call->written = true;
    call->since = metrics_begin(TAPFS_METRIC_FLUSH, 0, 0);
    fuse_note_passthrough(server);
    fuse_park(server, call);
}

void fuse_end(tapfs_fuse *server, struct fuse_call *call, int error, uint64_t found)
{
    if (error == 0 && call->durable) {
        make_durable(server, call);
        return;
    }
    fuse_answer(server, call, error, found);
    if (call->buffer != NULL) {
        fuse_buffer_return(server, call->buffer);
    }
    free(call);
}

struct fuse_call *fuse_call_keep(tapfs_fuse *server, const struct fuse_call *call)
{
    struct fuse_call *kept = malloc(sizeof *kept);
    if (kept == NULL) {
        fuse_answer(server, call, ENOMEM, 0);
        return NULL;
    }
    *kept = *call;
    return kept;
}

static uint32_t queue_of(const struct fuse_call *call)
{
    uint32_t request = call->request;
    if (request == TAPFS_FUSE_WRITE && call->outcome.status == TAPFS_RESERVE) {
        return TAPFS_WRITES;
    }
    if (request == TAPFS_FUSE_READ || request == TAPFS_FUSE_WRITE) {
        return TAPFS_MOVES;
    }
    return request == TAPFS_FUSE_SYNC ? TAPFS_SYNCS : TAPFS_OTHERS;
}

void fuse_park(tapfs_fuse *server, struct fuse_call *call)
{
    /* Before a thread can take it: who has taken a request finds it counted. */
    atomic_fetch_add(&server->parked, 1);
    if (!park_put(&server->park, queue_of(call), &call->entry)) {
        atomic_fetch_sub(&server->parked, 1);
        fuse_end(server, call, EIO, 0);
    }
}

void fuse_park_stop(tapfs_fuse *server)
{
    struct parked_entry *left = park_stop(&server->park);

    while (left != NULL) {
        struct fuse_call *call = (struct fuse_call *)(void *)left;
        left = left->next;
        fuse_end(server, call, EIO, 0);
    }
}
