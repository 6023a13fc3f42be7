/*
 * The way to the libfuse session and back.
 *
 * The session takes the bytes of one splice(2) for one message. But splice needs a stream socket, which keeps no
 * boundaries of messages. Ancillary data are a boundary in a stream (unix(7)): no read goes past a message that carries
 * a descriptor. So each message carries a descriptor, which the kernel drops, because the session takes no ancillary
 * data. No message is longer than the socket keeps in one piece. (It is not enough to wait until the last message has
 * left the socket, because the read that took it may go on.) A thread of its own writes to the session, so that the
 * threads that move data never wait for the session.
 *
 * An answer must go to the descriptor that its request came from. The top byte of `unique` has the number of that
 * descriptor's thread, below a bit that is the kernel's: it tells a request that was given again. The kernel counts
 * `unique` up by twos from zero and never comes near that byte.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "fuse/internal.h"

/* A stream socket cuts what is longer into pieces. Nothing that the tree needs is nearly as long. */
#define FORWARDED_MAX (32u << 10)
#define THREAD_SHIFT 56
#define GIVEN_AGAIN (UINT64_C(1) << 63)
#define UNIQUE_MASK (((UINT64_C(1) << THREAD_SHIFT) - 1) | GIVEN_AGAIN)
#define ANSWER_BYTES_MAX (MESSAGE_DATA_MAX + 4096u)
#define SOCKET_BYTES (4 << 20)

static bool has_answer(uint32_t opcode)
{
    return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_NOTIFY_REPLY;
}

static void fail_message(const struct fuse_message *message, int error)
{
    if (has_answer(message->header.opcode)) {
        fuse_reply(message->fd, message->header.unique & UNIQUE_MASK, error, NULL, 0);
    }
}

void fuse_forward(const struct fuse_thread *thread, const uint8_t *bytes, size_t length)
{
    tapfs_fuse *server = thread->server;
    struct fuse_in_header header;
    memcpy(&header, bytes, sizeof header);
    struct fuse_message *message =
        length > FORWARDED_MAX ? NULL : malloc(offsetof(struct fuse_message, header) + length);

    if (message == NULL) {
        if (has_answer(header.opcode)) {
            fuse_reply(thread->fd, header.unique, length > FORWARDED_MAX ? EMSGSIZE : ENOMEM, NULL, 0);
        }
        return;
    }
    message->next = NULL;
    message->length = length;
    message->fd = thread->fd;
    memcpy(&message->header, bytes, length);
    message->header.unique |= (uint64_t)thread->index << THREAD_SHIFT;

    pthread_mutex_lock(&server->forward_lock);
    bool closed = server->session_closed;
    if (!closed) {
        *(server->forward_first != NULL ? &server->forward_last->next : &server->forward_first) = message;
        server->forward_last = message;
        pthread_cond_signal(&server->forward_filled);
    }
    pthread_mutex_unlock(&server->forward_lock);
    if (closed) {
        fail_message(message, EIO);
        free(message);
    } else {
        atomic_fetch_add(&server->forwarded, 1);
    }
}

void fuse_forward_again(tapfs_fuse *server)
{
    fuse_init_asked(server, server->init, server->init_length);
    fuse_forward(&server->threads[0], server->init, server->init_length);
}

/* Nobody reads any more: everything that waits fails, and so does all that comes. */
static void close_session(tapfs_fuse *server)
{
    pthread_mutex_lock(&server->forward_lock);
    struct fuse_message *message = server->forward_first;
    server->forward_first = NULL;
    server->session_closed = true;
    pthread_cond_broadcast(&server->forward_filled);
    pthread_mutex_unlock(&server->forward_lock);
    while (message != NULL) {
        struct fuse_message *next = message->next;
        fail_message(message, EIO);
        free(message);
        message = next;
    }
}

static struct fuse_message *next_message(tapfs_fuse *server)
{
    pthread_mutex_lock(&server->forward_lock);
    while (server->forward_first == NULL && !server->session_closed) {
        pthread_cond_wait(&server->forward_filled, &server->forward_lock);
    }
    struct fuse_message *message = server->forward_first;
    if (message != NULL) {
        server->forward_first = message->next;
    }
    pthread_mutex_unlock(&server->forward_lock);
    return message;
}

static bool send_message(tapfs_fuse *server, const struct fuse_message *message)
{
    /* As many descriptors may be on their way as a process may have open. */
    const struct timespec pause = {.tv_nsec = 1000000};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } barrier = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec vector = {.iov_base = (void *)(uintptr_t)&message->header, .iov_len = message->length};
    struct msghdr parts = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = &barrier, .msg_controllen = sizeof barrier.space};

    memcpy(CMSG_DATA(&barrier.header), &server->ended_fd, sizeof server->ended_fd);
    for (;;) {
        ssize_t sent = sendmsg(server->session_fd, &parts, MSG_NOSIGNAL);
        if (sent >= 0) {
            return (size_t)sent == message->length;
        }
        if (errno == ETOOMANYREFS && !atomic_load(&server->stopping)) {
            nanosleep(&pause, NULL);
        } else if (errno != EINTR) {
            return false;
        }
    }
}

static void *forward(void *argument)
{
    tapfs_fuse *server = argument;
    struct fuse_message *message;

    while ((message = next_message(server)) != NULL) {
        if (send_message(server, message)) {
            free(message);
        } else {
            fail_message(message, EIO);
            free(message);
            close_session(server);
        }
    }
    return NULL;
}

/* One whole message of the session, at the start of `bytes`; the new length. */
static size_t pass_back(tapfs_fuse *server, uint8_t *bytes, size_t length, size_t capacity)
{
    struct fuse_out_header header;
    memcpy(&header, bytes, sizeof header);
    uint32_t index = (uint32_t)((header.unique & ~GIVEN_AGAIN) >> THREAD_SHIFT);
    int fd = index < server->thread_count ? server->threads[index].fd : server->fuse_fd;
    header.unique &= UNIQUE_MASK;
    memcpy(bytes, &header, sizeof header);

    uint64_t init = atomic_load(&server->init_unique);
    bool is_init = init != 0 && header.unique == init && header.error == 0;
    if (is_init) {
        length = fuse_init_amend(server, bytes, length, capacity);
    }
    /* Of a predecessor's INIT only what it means is wanted: the kernel has its answer. */
    ssize_t written = -1;
    do {
        if (server->taken_over && init != 0 && header.unique == init) {
            break;
        }
        written = write(fd, bytes, length);
    } while (written < 0 && errno == EINTR);
    if (is_init) {
        atomic_store(&server->init_unique, 0);
        fuse_init_answered(server);
    }
    return length;
}

static void *pass_answers(void *argument)
{
    tapfs_fuse *server = argument;
    /* The answer to INIT may grow, so a message is passed on from a place of its own. */
    uint8_t *buffer = malloc(ANSWER_BYTES_MAX);
    uint8_t init[4096];
    size_t have = 0;

    while (buffer != NULL) {
        ssize_t got = recv(server->session_fd, buffer + have, ANSWER_BYTES_MAX - have, 0);
        if (got == 0 || (got < 0 && errno != EINTR)) {
            break;
        }
        have += got < 0 ? 0 : (size_t)got;
        size_t at = 0;
        bool broken = false;
        while (have - at >= sizeof(struct fuse_out_header)) {
            struct fuse_out_header header;
            memcpy(&header, buffer + at, sizeof header);
            if (header.len < sizeof header || header.len > ANSWER_BYTES_MAX) {
                broken = true;
                break;
            }
            if (header.len > have - at) {
                break;
            }
            if (header.len <= sizeof init / 2) {
                memcpy(init, buffer + at, header.len);
                pass_back(server, init, header.len, sizeof init);
            } else {
                pass_back(server, buffer + at, header.len, header.len);
            }
            at += header.len;
        }
        if (broken) {
            break;
        }
        memmove(buffer, buffer + at, have - at);
        have -= at;
    }
    free(buffer);
    close_session(server);
    fuse_signal_ended(server);
    return NULL;
}

int fuse_session_start(tapfs_fuse *server)
{
    int bytes = SOCKET_BYTES;

    /* As large as we may: an ordinary user gets less, which is enough for what is forwarded. */
    if (setsockopt(server->session_fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) != 0) {
        setsockopt(server->session_fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    }
    int error = pthread_create(&server->forwarder, NULL, forward, server);
    if (error != 0) {
        return error;
    }
    server->forwarder_started = true;
    error = pthread_create(&server->replier, NULL, pass_answers, server);
    server->replier_started = error == 0;
    return error;
}

void fuse_session_stop(tapfs_fuse *server)
{
    close_session(server);
    shutdown(server->session_fd, SHUT_RDWR);
    if (server->forwarder_started) {
        pthread_join(server->forwarder, NULL);
    }
    if (server->replier_started) {
        pthread_join(server->replier, NULL);
    }
}
