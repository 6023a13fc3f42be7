/* Memory for messages and data: each native thread has a buffer, and so has each WRITE and READ that is on its way. */
#include <stdlib.h>
#include <sys/eventfd.h>

#include "fuse/internal.h"

static struct fuse_buffer *buffer_new(void)
{
    struct fuse_buffer *buffer = malloc(sizeof *buffer);
    if (buffer == NULL) {
        return NULL;
    }
    buffer->next = NULL;
    buffer->present = false;
    buffer->memory = aligned_alloc(DIRECT_ALIGNMENT, BUFFER_BYTES);
    if (buffer->memory == NULL) {
        free(buffer);
        return NULL;
    }
    return buffer;
}

/* Under the lock. NULL: no memory. */
static struct fuse_buffer *take(tapfs_fuse *server, enum fuse_share share)
{
    struct fuse_buffer *buffer = server->idle;
    if (buffer != NULL) {
        server->idle = buffer->next;
        server->idle_count--;
    } else {
        buffer = buffer_new();
        if (buffer == NULL) {
            return NULL;
        }
    }
    buffer->share = share;
    server->buffer_count[share]++;
    return buffer;
}

static bool has_any(const tapfs_fuse *server)
{
    for (size_t i = 0; i < SHARES; i++) {
        if (server->buffer_count[i] > 0) {
            return true;
        }
    }
    return false;
}

/*
 * Have all pages of a buffer present, before the kernel copies a request there. The kernel has taken the request from its
 * queue then. If it had to wait for a page, a kill of this process would make it fail the request (EIO) instead of
 * keeping it for a successor.
 */
static void make_present(struct fuse_buffer *buffer)
{
    for (size_t at = 0; at < BUFFER_BYTES; at += 4096) {
        *(volatile uint8_t *)(buffer->memory + at) = 0;
    }
    buffer->present = true;
}

struct fuse_buffer *fuse_buffer_take(tapfs_fuse *server)
{
    const uint32_t *count = server->buffer_count;
    struct fuse_buffer *buffer = NULL;

    pthread_mutex_lock(&server->buffer_lock);
    while (!atomic_load(&server->stopping)) {
        if (count[SHARE_THREAD] + count[SHARE_WRITE] < server->thread_count + WRITE_BUFFERS) {
            buffer = take(server, SHARE_THREAD);
            if (buffer != NULL || !has_any(server)) {
                break; /* without any there is none to wait for */
            }
        }
        pthread_cond_wait(&server->buffer_returned, &server->buffer_lock);
    }
    pthread_mutex_unlock(&server->buffer_lock);
    if (buffer != NULL && !buffer->present) {
        make_present(buffer);
    }
    return buffer;
}

struct fuse_buffer *fuse_buffer_for_read(tapfs_fuse *server, bool *never)
{
    struct fuse_buffer *buffer = NULL;

    pthread_mutex_lock(&server->buffer_lock);
    if (server->buffer_count[SHARE_READ] < READ_BUFFERS) {
        buffer = take(server, SHARE_READ);
    }
    *never = buffer == NULL && server->buffer_count[SHARE_READ] == 0;
    pthread_mutex_unlock(&server->buffer_lock);
    return buffer;
}

void fuse_buffer_to_write(tapfs_fuse *server, struct fuse_buffer *buffer)
{
    pthread_mutex_lock(&server->buffer_lock);
    server->buffer_count[buffer->share]--;
    buffer->share = SHARE_WRITE;
    server->buffer_count[buffer->share]++;
    pthread_mutex_unlock(&server->buffer_lock);
}

void fuse_buffer_return(tapfs_fuse *server, struct fuse_buffer *buffer)
{
    pthread_mutex_lock(&server->buffer_lock);
    server->buffer_count[buffer->share]--;
    if (server->idle_count < IDLE_BUFFERS) {
        buffer->next = server->idle;
        server->idle = buffer;
        server->idle_count++;
    } else {
        free(buffer->memory);
        free(buffer);
    }
    pthread_cond_signal(&server->buffer_returned);
    pthread_mutex_unlock(&server->buffer_lock);
    if (atomic_load(&server->moves.starved)) {
        eventfd_write(server->moves.wake_fd, 1);
    }
}

void fuse_buffers_stop(tapfs_fuse *server)
{
    pthread_mutex_lock(&server->buffer_lock);
    pthread_cond_broadcast(&server->buffer_returned);
    pthread_mutex_unlock(&server->buffer_lock);
}

void fuse_buffers_free(tapfs_fuse *server)
{
    while (server->idle != NULL) {
        struct fuse_buffer *buffer = server->idle;
        server->idle = buffer->next;
        free(buffer->memory);
        free(buffer);
    }
}
