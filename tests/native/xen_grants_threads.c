/*
 * Threads that hold and release persistent grants, and copy, beside a frontend that takes grants back and gives them again.
 * usage: xen_grants_threads MACHINE LIMIT ROUNDS; 0 and "ok", or a message and 1. In domain 1 of the machine reference
 * FIRST + n grants the page that begins with the word n; the last QUARTER of them is what the frontend plays with.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "xen/transport.h"

#define FIRST 8u
#define PAGES 64u
#define QUARTER (PAGES / 4)
#define THREADS 4
#define AT_ONCE 40u

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __LINE__))

static struct xen_transport *transport;
static struct xen_grants *grants;
static _Atomic uint32_t *table;
static int rounds;
static atomic_bool over;

static void die(const char *what, int line)
{
    fprintf(stderr, "line %d: %s (errno %d)\n", line, what, errno);
    exit(1);
}

static void check(int error, const uint32_t *references, uint32_t count, uint8_t **memory)
{
    bool played = false;

    for (uint32_t i = 0; i < count; i++) {
        played = played || references[i] - FIRST >= PAGES - QUARTER;
        if (error == 0) {
            uint32_t stamp;
            memcpy(&stamp, memory[i], sizeof stamp);
            REQUIRE(stamp == references[i] - FIRST);
        }
    }
    REQUIRE(error == 0 || (error == EINVAL && played));
}

static void *holder(void *argument)
{
    unsigned seed = (unsigned)(uintptr_t)argument;
    uint32_t references[2][AT_ONCE], count[2];
    uint8_t *memory[AT_ONCE];
    bool writable[2];
    int errors[2];

    for (int i = 0; i < rounds; i++) {
        /* Two requests at once, as under way in a ring. */
        for (int request = 0; request < 2; request++) {
            count[request] = 1 + (uint32_t)rand_r(&seed) % (i % 8 == 0 ? AT_ONCE : 8);
            uint32_t pages = rand_r(&seed) % 4 == 0 ? PAGES : PAGES - QUARTER;
            for (uint32_t n = 0; n < count[request]; n++) {
                references[request][n] = FIRST + (uint32_t)rand_r(&seed) % pages;
            }
            writable[request] = rand_r(&seed) % 2 == 0;
            errors[request] = xen_grants_hold(grants, references[request], count[request], writable[request], memory);
            check(errors[request], references[request], count[request], memory);
        }
        uint8_t local[16];
        struct xen_copy piece = {.local = local, .reference = references[0][0], .length = sizeof local};
        uint8_t *place = local;
        check(xen_copy(transport, &piece, 1, false), references[0], 1, &place);
        for (int request = 0; request < 2; request++) {
            if (errors[request] == 0) {
                xen_grants_release(grants, references[request], count[request], writable[request]);
            }
        }
    }
    return NULL;
}

static void *frontend(void *argument)
{
    unsigned seed = 99;

    while (!atomic_load(&over)) {
        uint32_t reference = FIRST + PAGES - QUARTER + (uint32_t)rand_r(&seed) % QUARTER;
        uint32_t entry = atomic_exchange(&table[reference], 0);
        usleep(50);
        atomic_store(&table[reference], entry);
    }
    return argument;
}

/* Places in our memory where a page of the domain is. */
static unsigned mappings(void)
{
    FILE *file = fopen("/proc/self/maps", "re");
    char line[4096];
    unsigned found = 0;

    REQUIRE(file != NULL);
    while (fgets(line, sizeof line, file) != NULL) {
        found += strstr(line, "domain-1.memory") != NULL;
    }
    fclose(file);
    return found;
}

int main(int count, char **arguments)
{
    pthread_t threads[THREADS], player;
    char path[4096];

    REQUIRE(count == 4);
    rounds = atoi(arguments[3]);
    snprintf(path, sizeof path, "%s/domain-1.grants", arguments[1]);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    REQUIRE(fd >= 0);
    table = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(table != MAP_FAILED);
    transport = xen_transport_open(arguments[1], 1);
    REQUIRE(transport != NULL && mappings() == 1);
    grants = xen_grants_new(transport, (uint32_t)atoi(arguments[2]));
    REQUIRE(grants != NULL);
    REQUIRE(pthread_create(&player, NULL, frontend, NULL) == 0);
    for (uintptr_t i = 0; i < THREADS; i++) {
        REQUIRE(pthread_create(&threads[i], NULL, holder, (void *)(i + 1)) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    atomic_store(&over, true);
    pthread_join(player, NULL);
    xen_grants_free(grants);
    REQUIRE(mappings() == 1);
    xen_transport_close(transport);
    REQUIRE(mappings() == 0);
    munmap((void *)(uintptr_t)table, 4096);
    close(fd);
    puts("ok");
    return 0;
}
