/* A client's connection: its socket, and when it is over. */
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbd/internal.h"

struct nbd_connection *nbd_connection_new(struct nbd_loop *loop, int fd, uint32_t style, uint32_t contexts)
{
    struct nbd_connection *connection = malloc(sizeof *connection);
    if (connection == NULL) {
        return NULL;
    }
    *connection = (struct nbd_connection){.loop = loop, .fd = fd, .style = style, .contexts = contexts};
    connection->output_end = &connection->output;
    return connection;
}

void nbd_connection_free(struct nbd_connection *connection)
{
    close(connection->fd); /* which takes it out of the epoll */
    free(connection);
}

/* A request that is half there gets no more pieces. Those that are under way end it. */
static void drop_current(struct nbd_connection *connection)
{
    struct nbd_request *request = connection->current;
    struct nbd_piece *piece = connection->filling;

    connection->current = NULL;
    connection->filling = NULL;
    if (request == NULL) {
        return;
    }
    request->asked.length = request->begun;
    request->error = ESHUTDOWN;
    if (piece != NULL) {
        nbd_piece_ended(piece, ESHUTDOWN);
    } else if (nbd_request_is_done(request)) {
        nbd_request_answer(request, ESHUTDOWN);
    }
}

void nbd_connection_end(struct nbd_connection *connection)
{
    connection->ended = true;
    nbd_touch(connection);
}

void nbd_connection_cut(struct nbd_connection *connection)
{
    connection->ended = true;
    nbd_drop_output(connection);
    drop_current(connection);
    shutdown(connection->fd, SHUT_RDWR);
    nbd_touch(connection);
}

static void watch(struct nbd_connection *connection, uint32_t events)
{
    if (events == connection->events) {
        return;
    }
    struct epoll_event event = {.events = events, .data.ptr = connection};
    /* Without anything to wait for it is not watched at all: the end of a socket is reported whatever was asked for. */
    int what = events == 0               ? EPOLL_CTL_DEL
               : connection->events == 0 ? EPOLL_CTL_ADD
                                         : EPOLL_CTL_MOD;
    if (epoll_ctl(connection->loop->epoll_fd, what, connection->fd, &event) == 0) {
        connection->events = events;
    } else if (!atomic_load(&connection->gone)) {
        nbd_connection_cut(connection);
    }
}

void nbd_connection_ready(struct nbd_connection *connection, uint32_t events)
{
    nbd_touch(connection);
    bool gone = (events & (EPOLLHUP | EPOLLERR)) != 0;
    if ((gone || (events & EPOLLIN) != 0) && !connection->ended && !nbd_input(connection)) {
        nbd_connection_cut(connection);
    } else if (gone) {
        /* Nobody takes answers any more. What the client has asked for before is in its socket, and done. */
        nbd_drop_output(connection);
    }
}

bool nbd_connection_look_after(struct nbd_connection *connection)
{
    size_t held = connection->held;
    enum nbd_parsed parsed = nbd_parse(connection);

    if (parsed == PARSED_NONSENSE || !nbd_send_queued(connection)) {
        nbd_connection_cut(connection);
    } else if (parsed == PARSED_NO_ROOM && connection->held < held) {
        nbd_touch(connection);
    }
    if (connection->ended && connection->current != NULL && connection->current->asked.command == CMD_WRITE) {
        drop_current(connection); /* its data is not read any more */
    }
    if (connection->ended && connection->current == NULL && connection->requests == 0 && connection->output == NULL) {
        return false;
    }
    bool full = parsed == PARSED_NO_ROOM || connection->ended;
    watch(connection, (full ? 0 : EPOLLIN) | (connection->output != NULL ? EPOLLOUT : 0));
    return true;
}
