/* Calls to a queue's thread from any thread: wake it, give a request back. */
#include <sys/eventfd.h>

#include "ublk/internal.h"

void ublk_wake(const struct ublk_queue *queue)
{
    eventfd_write(queue->wake_fd, 1); /* full: it is readable already */
}

void ublk_awake(const struct ublk_queue *queue)
{
    eventfd_t count;
    eventfd_read(queue->wake_fd, &count);
}

void ublk_give_back(struct ublk_request *request, int error)
{
    struct ublk_queue *queue = request->queue;

    request->error = error;
    pthread_mutex_lock(&queue->returned_lock);
    bool first = queue->returned.first == NULL;
    ublk_append(&queue->returned, request);
    if (first) {
        /* Under the lock: once the thread has the last request it may end. */
        ublk_wake(queue);
    }
    pthread_mutex_unlock(&queue->returned_lock);
}
