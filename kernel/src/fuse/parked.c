/* Buffers, and the requests that wait in them for the owner's threads. */
#include <errno.h>
#include <stdlib.h>

#include "fuse/internal.h"

static struct fuse_buffer *buffer_new(void)
{
    struct fuse_buffer *buffer = malloc(sizeof *buffer);
    if (buffer == NULL) {
        return NULL;
    }
    buffer->next = NULL;
    buffer->memory = aligned_alloc(DIRECT_ALIGNMENT, BUFFER_BYTES);
    if (buffer->memory == NULL) {
        free(buffer);
        return NULL;
    }
    return buffer;
}

struct fuse_buffer *fuse_buffer_take(tapfs_fuse *server)
{
    struct fuse_buffer *buffer = NULL;

    pthread_mutex_lock(&server->buffer_lock);
    while (!atomic_load(&server->stopping)) {
        if (server->idle != NULL) {
            buffer = server->idle;
            server->idle = buffer->next;
            server->idle_count--;
            break;
        }
        if (server->buffer_count < server->buffer_limit) {
            buffer = buffer_new();
            if (buffer != NULL) {
                server->buffer_count++;
                break;
            }
            if (server->buffer_count == 0) {
                break; /* no memory at all */
            }
        }
        pthread_cond_wait(&server->buffer_returned, &server->buffer_lock);
    }
    pthread_mutex_unlock(&server->buffer_lock);
    return buffer;
}

void fuse_buffer_return(tapfs_fuse *server, struct fuse_buffer *buffer)
{
    pthread_mutex_lock(&server->buffer_lock);
    if (server->idle_count < IDLE_BUFFERS) {
        buffer->next = server->idle;
        server->idle = buffer;
        server->idle_count++;
    } else {
        free(buffer->memory);
        free(buffer);
        server->buffer_count--;
    }
    pthread_cond_signal(&server->buffer_returned);
    pthread_mutex_unlock(&server->buffer_lock);
}

static void answer(tapfs_fuse *server, const struct fuse_call *call, int error, uint64_t found)
{
    if (error != 0) {
        fuse_reply(call->fd, call->unique, error, NULL, 0);
    } else if (call->request == TAPFS_FUSE_READ) {
        fuse_reply(call->fd, call->unique, 0, call->buffer->memory + BUFFER_DATA_AT, call->length);
    } else if (call->request == TAPFS_FUSE_WRITE) {
        struct fuse_write_out out = {.size = (uint32_t)call->length};
        fuse_wrote(server);
        fuse_reply(call->fd, call->unique, 0, &out, sizeof out);
    } else if (call->request == TAPFS_FUSE_SEEK_DATA || call->request == TAPFS_FUSE_SEEK_HOLE) {
        struct fuse_lseek_out out = {.offset = found - call->node->start};
        fuse_reply(call->fd, call->unique, 0, &out, sizeof out);
    } else {
        fuse_reply(call->fd, call->unique, 0, NULL, 0);
    }
    if (call->buffer != NULL) {
        fuse_buffer_return(server, call->buffer);
    }
}

void fuse_park(tapfs_fuse *server, const struct fuse_call *call)
{
    struct fuse_call *parked = malloc(sizeof *parked);
    bool refused = parked == NULL;

    if (parked != NULL) {
        *parked = *call;
        parked->next = NULL;
        pthread_mutex_lock(&server->park_lock);
        refused = atomic_load(&server->stopping);
        if (!refused) {
            bool moves = call->request == TAPFS_FUSE_READ || call->request == TAPFS_FUSE_WRITE;
            struct fuse_queue *queue = &server->queues[moves ? TAPFS_FUSE_MOVES : TAPFS_FUSE_OTHERS];
            *(queue->first != NULL ? &queue->last->next : &queue->first) = parked;
            queue->last = parked;
            atomic_fetch_add(&server->parked, 1); /* before anybody can take it */
            pthread_cond_signal(&queue->filled);
        }
        pthread_mutex_unlock(&server->park_lock);
    }
    if (refused) {
        free(parked);
        answer(server, call, EIO, 0);
    }
}

void fuse_park_stop(tapfs_fuse *server)
{
    struct fuse_call *left[2];

    pthread_mutex_lock(&server->park_lock);
    for (size_t i = 0; i < 2; i++) {
        left[i] = server->queues[i].first;
        server->queues[i].first = NULL;
        pthread_cond_broadcast(&server->queues[i].filled);
    }
    pthread_mutex_unlock(&server->park_lock);
    for (size_t i = 0; i < 2; i++) {
        while (left[i] != NULL) {
            struct fuse_call *call = left[i];
            left[i] = call->next;
            answer(server, call, EIO, 0);
            free(call);
        }
    }
    pthread_mutex_lock(&server->buffer_lock);
    pthread_cond_broadcast(&server->buffer_returned);
    pthread_mutex_unlock(&server->buffer_lock);
}

static void describe(const struct fuse_call *call, tapfs_fuse_parked *parked)
{
    *parked = (tapfs_fuse_parked){
        .ticket = call->ticket,
        .offset = call->node->start + call->offset + call->done,
        .length = call->length - call->done,
        .data = call->request == TAPFS_FUSE_WRITE ? call->buffer->memory + BUFFER_DATA_AT + call->done : NULL,
        .request = call->request,
        .outcome = call->outcome,
    };
}

int tapfs_fuse_next_parked(tapfs_fuse *server, uint32_t number, tapfs_fuse_parked *parked)
{
    struct fuse_queue *queue = &server->queues[number == TAPFS_FUSE_MOVES ? TAPFS_FUSE_MOVES : TAPFS_FUSE_OTHERS];
    struct fuse_call *call;

    pthread_mutex_lock(&server->park_lock);
    while (queue->first == NULL && !atomic_load(&server->stopping)) {
        pthread_cond_wait(&queue->filled, &server->park_lock);
    }
    call = queue->first;
    if (call != NULL) {
        queue->first = call->next;
        call->next = server->taken;
        server->taken = call;
        call->ticket = ++server->last_ticket;
        describe(call, parked);
    }
    pthread_mutex_unlock(&server->park_lock);
    return call != NULL;
}

/* A call that somebody has taken, and takes off the list with `remove`. */
static struct fuse_call *taken_call(tapfs_fuse *server, uint64_t ticket, bool remove)
{
    pthread_mutex_lock(&server->park_lock);
    struct fuse_call **link = &server->taken;
    while (*link != NULL && (*link)->ticket != ticket) {
        link = &(*link)->next;
    }
    struct fuse_call *call = *link;
    if (call != NULL && remove) {
        *link = call->next;
    }
    pthread_mutex_unlock(&server->park_lock);
    return call;
}

int tapfs_fuse_resume(tapfs_fuse *server, uint64_t ticket, tapfs_fuse_parked *parked)
{
    /* Whoever took it is the only one who touches it. */
    struct fuse_call *call = taken_call(server, ticket, false);
    if (call == NULL || call->buffer == NULL) {
        return 0;
    }
    if (!fuse_move(server, call)) {
        describe(call, parked);
        return 1;
    }
    taken_call(server, ticket, true);
    fuse_buffer_return(server, call->buffer);
    free(call);
    return 0;
}

void tapfs_fuse_complete(tapfs_fuse *server, uint64_t ticket, int error, uint64_t found)
{
    struct fuse_call *call = taken_call(server, ticket, true);
    if (call == NULL) {
        return;
    }
    /* Only a READ that was moved to its end has an answer; that is for resume to give. */
    bool unread = error == 0 && call->request == TAPFS_FUSE_READ;
    answer(server, call, unread ? EIO : error, found);
    free(call);
}
