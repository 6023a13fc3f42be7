/*
 * Everything that runs beside everything else in the engine and its FUSE server, for ThreadSanitizer:
 * clients, native threads, owners that supply maps and places, a session, and somebody who forgets,
 * flushes and quiesces. usage: fuse_server_threads FILE ROUNDS; 0 and "ok", or a message and 1.
 *
 * Every byte that is ever written depends on its offset alone, so whatever the order, a read finds
 * that byte or zero.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fuse/server.h"
#include "owned_disk.h"

#define NODE 2
#define CLIENTS 3
#define OWNERS 2
#define AT_ONCE 24
#define MESSAGE_MAX (96u << 10)

static tapfs_fuse *server;
static int device, session, rounds;
static sem_t room;
static _Atomic unsigned long next_unique = 2;
static _Atomic unsigned answered;
static atomic_bool over;

static void ask(uint32_t opcode, uint64_t node, const void *body, size_t length, const void *data, size_t data_length)
{
    struct fuse_in_header header = {.opcode = opcode, .nodeid = node};
    header.len = (uint32_t)(sizeof header + length + data_length);
    header.unique = atomic_fetch_add(&next_unique, 2);
    struct iovec vector[3] = {{&header, sizeof header}, {(void *)(uintptr_t)body, length}, {(void *)(uintptr_t)data, data_length}};
    sem_wait(&room);
    REQUIRE(writev(device, vector, 3) == (ssize_t)header.len);
}

static void *client(void *argument)
{
    unsigned seed = (unsigned)(uintptr_t)argument;
    uint8_t *data = malloc(MESSAGE_MAX);
    for (int i = 0; i < rounds; i++) {
        uint64_t offset = (uint64_t)rand_r(&seed) % SIZE;
        uint32_t size = rand_r(&seed) % 8 == 0 ? 40000 : (uint32_t)rand_r(&seed) % 6000;
        if (size > SIZE - offset) {
            size = (uint32_t)(SIZE - offset);
        }
        switch (rand_r(&seed) % 10) {
        case 0: case 1: case 2: case 3: {
            struct fuse_read_in in = {.fh = 0, .offset = offset, .size = size};
            ask(FUSE_READ, NODE, &in, sizeof in, NULL, 0);
            break;
        }
        case 4: case 5: case 6: case 7: {
            struct fuse_write_in in = {.offset = offset, .size = size};
            for (uint32_t j = 0; j < size; j++) {
                data[j] = byte_at(offset + j);
            }
            ask(FUSE_WRITE, NODE, &in, sizeof in, data, size);
            break;
        }
        case 8: {
            struct fuse_fsync_in in = {.fh = 0};
            ask(FUSE_FSYNC, NODE, &in, sizeof in, NULL, 0);
            break;
        }
        default:
            ask(FUSE_LOOKUP, 1, "name", 5, NULL, 0);
        }
    }
    free(data);
    return NULL;
}

static void *receive(void *argument)
{
    uint8_t *message = malloc(MESSAGE_MAX);
    (void)argument;
    for (;;) {
        ssize_t got = recv(device, message, MESSAGE_MAX, 0);
        if (got <= 0) {
            break;
        }
        struct fuse_out_header header;
        memcpy(&header, message, sizeof header);
        REQUIRE(header.len == (uint32_t)got);
        REQUIRE(header.error == 0 || (header.error == -EIO && atomic_load(&over)));
        atomic_fetch_add(&answered, 1);
        sem_post(&room);
    }
    free(message);
    return NULL;
}

static void *be_session(void *argument)
{
    uint8_t message[4096];
    (void)argument;
    for (;;) {
        ssize_t got = recv(session, message, sizeof message, 0);
        if (got <= 0) {
            return NULL;
        }
        struct fuse_in_header in;
        memcpy(&in, message, sizeof in);
        REQUIRE(in.len == (uint32_t)got);
        struct fuse_out_header out = {.len = sizeof out, .unique = in.unique};
        send(session, &out, sizeof out, MSG_NOSIGNAL);
    }
}

static void *own_moves(void *argument)
{
    uint32_t queue = *(const uint32_t *)argument;
    tapfs_parked parked;
    while (tapfs_fuse_next_parked(server, queue, &parked, 1)) {
        do {
            give_what_is_missing(disk, &parked);
        } while (tapfs_fuse_resume_parked(server, parked.ticket, &parked));
    }
    return NULL;
}

static void *own_others(void *argument)
{
    tapfs_parked parked;
    (void)argument;
    while (tapfs_fuse_next_parked(server, TAPFS_SYNCS, &parked, 1)) {
        tapfs_outcome outcome;
        tapfs_sync(disk, &outcome);
        tapfs_fuse_complete(server, parked.ticket, outcome.status == TAPFS_DONE ? 0 : EIO, 0);
    }
    return NULL;
}

static void *disturb(void *argument)
{
    unsigned seed = 99;
    (void)argument;
    while (!atomic_load(&over)) {
        tapfs_fuse_statistics requests;
        disturb_disk(&seed);
        tapfs_fuse_counters(server, &requests);
        tapfs_fuse_last_write(server);
        usleep(200);
    }
    return NULL;
}

int main(int count, char **words)
{
    pthread_t clients[CLIENTS], owners[OWNERS], other, receiver, player, disturber;
    int devices[2], sessions[2], large = 1 << 20;

    REQUIRE(count == 3);
    rounds = atoi(words[2]);
    owned_disk_open(words[1]);
    REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, devices) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, sessions) == 0);
    for (int i = 0; i < 2; i++) {
        setsockopt(devices[i], SOL_SOCKET, SO_SNDBUF, &large, sizeof large);
    }
    device = devices[0];
    session = sessions[0];
    sem_init(&room, 0, AT_ONCE);
    server = tapfs_fuse_new(devices[1], sessions[1], disk);
    REQUIRE(server != NULL && tapfs_fuse_add_node(server, NODE, 0, SIZE, 1, -1) == 0);
    REQUIRE(tapfs_fuse_start(server, 3) == 0);

    pthread_create(&receiver, NULL, receive, NULL);
    pthread_create(&player, NULL, be_session, NULL);
    pthread_create(&other, NULL, own_others, NULL);
    pthread_create(&disturber, NULL, disturb, NULL);
    for (uintptr_t i = 0; i < OWNERS; i++) {
        static const uint32_t queues_of_owners[2] = {TAPFS_MOVES, TAPFS_WRITES};
        pthread_create(&owners[i], NULL, own_moves, (void *)(uintptr_t)&queues_of_owners[i % 2]);
    }
    for (uintptr_t i = 0; i < CLIENTS; i++) {
        pthread_create(&clients[i], NULL, client, (void *)(i + 1));
    }
    for (size_t i = 0; i < CLIENTS; i++) {
        pthread_join(clients[i], NULL);
    }
    while (atomic_load(&answered) < (unsigned)(CLIENTS * rounds)) {
        usleep(1000);
    }
    /* And an end in the middle of everything. */
    atomic_store(&over, true);
    struct fuse_read_in in = {.offset = 0, .size = 30000};
    for (int i = 0; i < AT_ONCE; i++) {
        ask(i % 2 ? FUSE_LOOKUP : FUSE_READ, i % 2 ? 1 : NODE, &in, sizeof in, NULL, 0);
    }
    tapfs_fuse_stop(server);
    for (size_t i = 0; i < OWNERS; i++) {
        pthread_join(owners[i], NULL);
    }
    pthread_join(other, NULL);
    pthread_join(disturber, NULL);
    tapfs_fuse_free(server);
    pthread_join(receiver, NULL);
    pthread_join(player, NULL);
    owned_disk_close();
    close(device);
    close(session);
    puts("ok");
    return 0;
}
