/* Memory for messages and data: each native thread has a buffer, and each READ and WRITE that is parked has one. */
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
