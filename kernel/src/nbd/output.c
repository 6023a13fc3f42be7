/* The output of a connection: replies wait in a queue, and as many as fit go into one message to the socket. */
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "nbd/internal.h"

/* Replies in one system call. */
#define PARTS 128u

void nbd_hold(struct nbd_connection *connection, size_t bytes)
{
    connection->held += bytes;
    atomic_fetch_add_explicit(&connection->loop->server->held, bytes, memory_order_relaxed);
}

void nbd_let_go(struct nbd_connection *connection, size_t bytes)
{
    connection->held -= bytes;
    atomic_fetch_sub_explicit(&connection->loop->server->held, bytes, memory_order_relaxed);
}

void nbd_touch(struct nbd_connection *connection)
{
    if (!connection->touched) {
        connection->touched = true;
        connection->next_touched = connection->loop->touched;
        connection->loop->touched = connection;
    }
}

static void release(struct nbd_connection *connection, struct nbd_output *output)
{
    nbd_let_go(connection, output->held);
    nbd_memory_give(connection->loop, output->memory, output->spare);
}

void nbd_send(struct nbd_connection *connection, struct nbd_output *output)
{
    nbd_touch(connection);
    if (atomic_load(&connection->gone)) {
        release(connection, output);
        return;
    }
    output->next = NULL;
    output->sent = 0;
    *connection->output_end = output;
    connection->output_end = &output->next;
}

bool nbd_send_copy(struct nbd_connection *connection, const void *bytes, size_t length)
{
    struct nbd_output *output = malloc(sizeof *output + length);
    if (output == NULL) {
        return false;
    }
    uint8_t *copy = (uint8_t *)(output + 1);
    memcpy(copy, bytes, length);
    *output = (struct nbd_output){
        .bytes = copy, .length = length, .memory = output, .held = sizeof *output + length};
    nbd_hold(connection, output->held);
    nbd_send(connection, output);
    return true;
}

static void pop(struct nbd_connection *connection)
{
    struct nbd_output *output = connection->output;
    connection->output = output->next;
    if (connection->output == NULL) {
        connection->output_end = &connection->output;
    }
    release(connection, output);
}

static void sent(struct nbd_connection *connection, size_t bytes)
{
    while (bytes > 0) {
        struct nbd_output *output = connection->output;
        size_t of_this = minimum(bytes, output->length - output->sent);
        output->sent += of_this;
        bytes -= of_this;
        if (output->sent == output->length) {
            pop(connection);
        }
    }
}

bool nbd_send_queued(struct nbd_connection *connection)
{
    while (connection->output != NULL) {
        struct iovec parts[PARTS];
        struct msghdr message = {.msg_iov = parts};

        for (struct nbd_output *output = connection->output; output != NULL && message.msg_iovlen < PARTS;
             output = output->next) {
            parts[message.msg_iovlen++] = (struct iovec){
                /* struct iovec serves readers too, hence not const. */
                .iov_base = (void *)(uintptr_t)(output->bytes + output->sent),
                .iov_len = output->length - output->sent,
            };
        }
        ssize_t taken = sendmsg(connection->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (taken < 0 && errno != EINTR) {
            return errno == EAGAIN || errno == EWOULDBLOCK;
        }
        sent(connection, taken < 0 ? 0 : (size_t)taken);
    }
    return true;
}

void nbd_drop_output(struct nbd_connection *connection)
{
    atomic_store(&connection->gone, true);
    while (connection->output != NULL) {
        pop(connection);
    }
}
