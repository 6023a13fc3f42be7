/*
 * Everything that runs beside everything else in the engine and its NBD server, for ThreadSanitizer: clients that come,
 * ask, and go in the middle, native threads, owners that supply maps and places and flush, and somebody who forgets,
 * flushes, quiesces, pauses, and sets the disk, which is to be had later at first. usage: nbd_server_threads FILE ROUNDS; 0 and "ok", or a message and 1.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nbd/nbd.h"
#include "owned_disk.h"

#define CLIENTS 4
#define WINDOW 8 /* requests that a client has under way */
#define LONGEST 40000u
#define FUA 1u

enum { READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS };

static tapfs_nbd *server;
static int rounds;
static atomic_bool over;

struct asked {
    unsigned command;
    uint64_t offset;
    uint32_t length;
};

static void put(uint8_t *at, uint64_t value, int bytes)
{
    while (bytes-- > 0) {
        at[bytes] = (uint8_t)value;
        value >>= 8;
    }
}

static uint64_t get(const uint8_t *at, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) {
        value = value << 8 | at[i];
    }
    return value;
}

/* -1: the server stops. */
static int come(void)
{
    int pair[2];
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    REQUIRE(fcntl(pair[1], F_SETFL, O_NONBLOCK) == 0);
    if (tapfs_nbd_add(server, pair[1], TAPFS_NBD_STRUCTURED, 1) == 0) {
        return pair[0];
    }
    close(pair[0]);
    close(pair[1]);
    return -1;
}

/* False: the server has closed, as it does at the end. */
static bool say(int fd, const void *bytes, size_t length)
{
    const uint8_t *at = bytes;
    while (length > 0) {
        ssize_t sent = send(fd, at, length, MSG_NOSIGNAL);
        if (sent <= 0) {
            return false;
        }
        at += sent;
        length -= (size_t)sent;
    }
    return true;
}

static bool hear(int fd, void *bytes, size_t length)
{
    return length == 0 || recv(fd, bytes, length, MSG_WAITALL) == (ssize_t)length;
}

static bool ask(int fd, unsigned *seed, struct asked *asked, uint64_t cookie, uint8_t *data)
{
    uint8_t header[28] = {0};
    unsigned flags = rand_r(seed) % 8 == 0 ? FUA : 0;
    uint64_t offset = (uint64_t)rand_r(seed) % SIZE;
    uint32_t length = 1 + (uint32_t)rand_r(seed) % (rand_r(seed) % 8 == 0 ? LONGEST : 6000u);
    static const unsigned commands[] = {READ, READ, READ, WRITE, WRITE, WRITE, FLUSH, BLOCK_STATUS};
    unsigned command = commands[(unsigned)rand_r(seed) % 8];

    length = length > SIZE - offset ? (uint32_t)(SIZE - offset) : length;
    *asked = (struct asked){command, offset, length};
    put(header, 0x25609513u, 4);
    put(header + 4, flags, 2);
    put(header + 6, command, 2);
    put(header + 8, cookie, 8);
    put(header + 16, offset, 8);
    put(header + 24, length, 4);
    for (uint32_t i = 0; command == WRITE && i < length; i++) {
        data[i] = byte_at(offset + i);
    }
    return say(fd, header, sizeof header) && (command != WRITE || say(fd, data, length));
}

/* Whether a chunk answers a part of what a READ has asked for. */
static bool is_part(const struct asked *asked, uint64_t offset, uint64_t length)
{
    return asked->command == READ && length > 0 && offset >= asked->offset && length <= asked->length &&
           offset - asked->offset <= asked->length - length;
}

/* One chunk; false: the server has closed. `done`: it was the last of its reply. */
static bool take(int fd, const struct asked *window, uint8_t *data, bool *done)
{
    uint8_t header[20];
    if (!hear(fd, header, sizeof header)) {
        return false;
    }
    REQUIRE(get(header, 4) == 0x668e33efu);
    const struct asked *asked = &window[get(header + 8, 8) % WINDOW];
    uint64_t type = get(header + 6, 2), length = get(header + 16, 4);
    REQUIRE(length <= LONGEST + 8);
    if (!hear(fd, data, length)) {
        return false;
    }
    *done = (get(header + 4, 2) & 1) != 0;
    if (type == 1) {
        REQUIRE(length > 8 && is_part(asked, get(data, 8), length - 8));
        for (uint64_t i = 0; i < length - 8; i++) {
            REQUIRE(data[8 + i] == 0 || data[8 + i] == byte_at(get(data, 8) + i));
        }
    } else if (type == 2) {
        REQUIRE(length == 12 && is_part(asked, get(data, 8), get(data + 8, 4)));
    } else if (type == 5) {
        REQUIRE(asked->command == BLOCK_STATUS && length == 12 && get(data + 4, 4) == asked->length);
    } else if (type == 0x8001) {
        REQUIRE(atomic_load(&over) && get(data, 4) == ESHUTDOWN);
    } else {
        REQUIRE(type == 0 && length == 0);
    }
    return true;
}

static void *client(void *argument)
{
    unsigned seed = (unsigned)(uintptr_t)argument;
    uint8_t *data = malloc(LONGEST + 8);
    int fd = come();
    bool open = true;

    while (open) {
        struct asked window[WINDOW];
        int waits = 0;
        for (; open && waits < WINDOW; waits++) {
            open = ask(fd, &seed, &window[waits], (uint64_t)waits, data);
        }
        if (open && rand_r(&seed) % 16 == 0) {
            close(fd); /* and takes no answer */
            fd = come();
            open = fd >= 0;
            continue;
        }
        while (open && waits > 0) {
            bool done;
            open = take(fd, window, data, &done);
            waits -= open && done;
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    free(data);
    return NULL;
}

static void *own_moves(void *argument)
{
    uint32_t queue = *(const uint32_t *)argument;
    tapfs_parked parked;
    while (tapfs_nbd_next_parked(server, queue, &parked, 1)) {
        if (parked.request == TAPFS_NBD_STATUS) {
            tapfs_nbd_state state = {.length = parked.length};
            int single;
            REQUIRE(tapfs_nbd_wanted(server, parked.ticket, &single) == 1 && single == 0);
            REQUIRE(tapfs_nbd_add_states(server, parked.ticket, 0, &state, 1) == 0);
            tapfs_nbd_complete(server, parked.ticket, 0);
            continue;
        }
        do {
            give_what_is_missing(disk, &parked);
        } while (tapfs_nbd_resume_parked(server, parked.ticket, &parked));
    }
    return NULL;
}

static void *own_syncs(void *argument)
{
    tapfs_parked parked[4];
    size_t count;
    (void)argument;
    while ((count = tapfs_nbd_next_parked(server, TAPFS_SYNCS, parked, 4)) > 0) {
        tapfs_outcome outcome;
        tapfs_sync(disk, &outcome);
        for (size_t i = 0; i < count; i++) {
            tapfs_nbd_given_up(server, parked[i].ticket);
            tapfs_nbd_complete(server, parked[i].ticket, outcome.status == TAPFS_DONE ? 0 : EIO);
        }
    }
    return NULL;
}

static void *disturb(void *argument)
{
    unsigned seed = 99;
    (void)argument;
    while (!atomic_load(&over)) {
        tapfs_nbd_statistics requests;
        disturb_disk(&seed);
        tapfs_nbd_counters(server, &requests);
        if (rand_r(&seed) % 4 == 0) {
            tapfs_nbd_pause(server);
            tapfs_nbd_counters(server, &requests);
            uint64_t answered = requests.reads + requests.writes;
            tapfs_nbd_waits(server);
            tapfs_nbd_set_disk(server, disk, SIZE, TAPFS_NBD_WRITABLE);
            tapfs_nbd_counters(server, &requests);
            REQUIRE(requests.reads + requests.writes == answered);
            tapfs_nbd_unpause(server);
        }
        usleep(200);
    }
    return NULL;
}

int main(int count, char **words)
{
    static const uint32_t queues[] = {TAPFS_MOVES, TAPFS_WRITES};
    pthread_t clients[CLIENTS], movers[2], syncer, disturber;
    tapfs_nbd_statistics requests;

    REQUIRE(count == 3);
    rounds = atoi(words[2]);
    owned_disk_open(words[1]);
    server = tapfs_nbd_new(disk, SIZE, TAPFS_NBD_LATER);
    REQUIRE(server != NULL && tapfs_nbd_start(server, 2) == 0);
    for (size_t i = 0; i < 2; i++) {
        pthread_create(&movers[i], NULL, own_moves, (void *)(uintptr_t)&queues[i]);
    }
    pthread_create(&syncer, NULL, own_syncs, NULL);
    pthread_create(&disturber, NULL, disturb, NULL);
    for (uintptr_t i = 0; i < CLIENTS; i++) {
        pthread_create(&clients[i], NULL, client, (void *)(i + 1));
    }
    do {
        usleep(1000);
        tapfs_nbd_counters(server, &requests);
    } while (requests.reads + requests.writes < (uint64_t)rounds * CLIENTS);
    /* And an end in the middle of everything. */
    atomic_store(&over, true);
    pthread_join(disturber, NULL);
    tapfs_nbd_stop(server);
    for (size_t i = 0; i < 2; i++) {
        pthread_join(movers[i], NULL);
    }
    pthread_join(syncer, NULL);
    for (size_t i = 0; i < CLIENTS; i++) {
        pthread_join(clients[i], NULL);
    }
    tapfs_nbd_counters(server, &requests);
    REQUIRE(requests.connections == 0 && requests.held == 0);
    tapfs_nbd_free(server);
    owned_disk_close();
    puts("ok");
    return 0;
}
