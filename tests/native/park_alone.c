/*
 * The park by itself, without any front end: its order, tickets, stop; and threads that put, take and remove while
 * it is stopped. usage: park_alone; 0 and "ok", or a message and 1.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "serving/park.h"

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __LINE__))
#define PUTTERS 3
#define TAKERS 3
#define ROUNDS 5000

/* What a front end's request looks like. */
struct item {
    struct parked_entry entry;
    uint32_t number;
    _Atomic unsigned ended;
};

static void die(const char *what, int line)
{
    fprintf(stderr, "line %d: %s (errno %d)\n", line, what, errno);
    exit(1);
}

static struct item *item_of(struct parked_entry *entry)
{
    return (struct item *)(void *)entry;
}

static struct parked_entry *next_of(struct park *park, uint32_t queue)
{
    struct parked_entry *entry = NULL;
    size_t count = park_next(park, queue, &entry, 1);
    REQUIRE(count == (entry != NULL));
    return entry;
}

/* ---- one thread */

static void take_as_many_as_there_are(void)
{
    struct park park;
    struct item items[6] = {{.number = 0}};
    struct parked_entry *taken[4];

    park_init(&park);
    for (uint32_t i = 0; i < 6; i++) {
        items[i].number = i;
        REQUIRE(park_put(&park, i == 2 ? TAPFS_MOVES : TAPFS_WRITES, &items[i].entry));
    }
    REQUIRE(park_next(&park, TAPFS_WRITES, taken, 4) == 4);
    for (size_t i = 0; i < 4; i++) {
        REQUIRE(item_of(taken[i])->number == (i < 2 ? i : i + 1));
        REQUIRE(park_taken(&park, taken[i]->ticket, true) == taken[i]);
    }
    REQUIRE(park_next(&park, TAPFS_WRITES, taken, 4) == 1 && item_of(taken[0])->number == 5);
    REQUIRE(park_stop(&park) == &items[2].entry);
    REQUIRE(park_next(&park, TAPFS_WRITES, taken, 4) == 0);
    park_destroy(&park);
}

static void keep_the_order_of_each_queue(void)
{
    struct park park;
    struct item items[6] = {{.number = 0}};

    park_init(&park);
    for (uint32_t i = 0; i < 6; i++) {
        items[i].number = i;
        REQUIRE(park_put(&park, i % 2 ? TAPFS_OTHERS : TAPFS_MOVES, &items[i].entry));
    }
    for (uint32_t i = 0; i < 6; i += 2) {
        REQUIRE(item_of(next_of(&park, TAPFS_MOVES))->number == i);
    }
    REQUIRE(item_of(next_of(&park, 99))->number == 1); /* a queue that there is not is the others' */
    REQUIRE(item_of(next_of(&park, TAPFS_OTHERS))->number == 3);
    REQUIRE(item_of(next_of(&park, TAPFS_OTHERS))->number == 5);
    park_stop(&park);
    park_destroy(&park);
}

static void count_visit(struct parked_entry *entry, void *argument)
{
    unsigned *visits = argument;
    visits[item_of(entry)->number]++;
}

static void visit_what_waits_and_what_was_taken(void)
{
    struct park park;
    struct item items[4] = {{.number = 0}};
    static const uint32_t queues[4] = {TAPFS_MOVES, TAPFS_OTHERS, TAPFS_SYNCS, TAPFS_SYNCS};
    unsigned visits[4] = {0};

    park_init(&park);
    for (uint32_t i = 0; i < 4; i++) {
        items[i].number = i;
        REQUIRE(park_put(&park, queues[i], &items[i].entry));
    }
    REQUIRE(next_of(&park, TAPFS_SYNCS) == &items[2].entry);
    REQUIRE(next_of(&park, TAPFS_MOVES) == &items[0].entry);
    REQUIRE(park_taken(&park, items[0].entry.ticket, true) == &items[0].entry);
    park_each(&park, count_visit, visits);
    REQUIRE(visits[0] == 0 && visits[1] == 1 && visits[2] == 1 && visits[3] == 1);
    park_stop(&park);
    park_destroy(&park);
}

static void find_what_was_taken_by_its_ticket(void)
{
    struct park park;
    struct item items[3] = {{.number = 0}};
    uint64_t tickets[3];

    park_init(&park);
    for (uint32_t i = 0; i < 3; i++) {
        REQUIRE(park_put(&park, TAPFS_MOVES, &items[i].entry));
        REQUIRE(park_taken(&park, i + 1, false) == NULL); /* put is not taken */
        REQUIRE(next_of(&park, TAPFS_MOVES) == &items[i].entry);
        tickets[i] = items[i].entry.ticket;
    }
    REQUIRE(tickets[0] != tickets[1] && tickets[1] != tickets[2] && tickets[0] != tickets[2]);
    REQUIRE(park_taken(&park, 0, true) == NULL && park_taken(&park, UINT64_MAX, true) == NULL);
    REQUIRE(park_taken(&park, tickets[1], false) == &items[1].entry);
    REQUIRE(park_taken(&park, tickets[1], true) == &items[1].entry);
    REQUIRE(park_taken(&park, tickets[1], true) == NULL); /* once */
    /* Parked again it has another ticket: who still holds the old one reaches nothing. */
    REQUIRE(park_put(&park, TAPFS_OTHERS, &items[1].entry) && next_of(&park, TAPFS_OTHERS) == &items[1].entry);
    REQUIRE(items[1].entry.ticket != tickets[1] && park_taken(&park, tickets[1], false) == NULL);
    REQUIRE(park_taken(&park, items[1].entry.ticket, true) == &items[1].entry);
    REQUIRE(park_taken(&park, tickets[0], true) == &items[0].entry);
    REQUIRE(park_taken(&park, tickets[2], true) == &items[2].entry);
    park_stop(&park);
    park_destroy(&park);
}

static void stop_hands_back_what_nobody_took(void)
{
    struct park park;
    struct item items[5] = {{.number = 0}};
    static const uint32_t queues[5] = {TAPFS_OTHERS, TAPFS_MOVES, TAPFS_MOVES, TAPFS_OTHERS, TAPFS_MOVES};
    static const size_t left[4] = {2, 4, 0, 3};

    park_init(&park);
    for (size_t i = 0; i < 5; i++) {
        REQUIRE(park_put(&park, queues[i], &items[i].entry));
    }
    REQUIRE(next_of(&park, TAPFS_MOVES) == &items[1].entry);
    struct parked_entry *entry = park_stop(&park);
    for (size_t i = 0; i < 4; i++, entry = entry->next) {
        REQUIRE(entry == &items[left[i]].entry);
    }
    REQUIRE(entry == NULL);
    REQUIRE(next_of(&park, TAPFS_MOVES) == NULL && next_of(&park, TAPFS_OTHERS) == NULL);
    REQUIRE(!park_put(&park, TAPFS_MOVES, &items[2].entry)); /* and stays ours */
    REQUIRE(park_stop(&park) == NULL);
    /* What was taken before can still be finished. */
    REQUIRE(park_taken(&park, items[1].entry.ticket, true) == &items[1].entry);
    park_destroy(&park);
}

/* ---- many threads */

static struct park shared;
static struct item all[PUTTERS][ROUNDS];
static _Atomic unsigned refused, taken, waiting;

static void *put(void *argument)
{
    struct item *items = argument;
    for (size_t i = 0; i < ROUNDS; i++) {
        if (!park_put(&shared, i % 2 ? TAPFS_OTHERS : TAPFS_MOVES, &items[i].entry)) {
            atomic_fetch_add(&items[i].ended, 1);
            atomic_fetch_add(&refused, 1);
        }
    }
    return NULL;
}

static void *take(void *argument)
{
    uint32_t queue = *(const uint32_t *)argument;
    struct parked_entry *entry;

    atomic_fetch_add(&waiting, 1);
    while ((entry = next_of(&shared, queue)) != NULL) {
        REQUIRE(park_taken(&shared, entry->ticket, false) == entry);
        REQUIRE(park_taken(&shared, entry->ticket, true) == entry);
        atomic_fetch_add(&item_of(entry)->ended, 1);
        atomic_fetch_add(&taken, 1);
    }
    return NULL;
}

/* `early`: before anything is put, when all takers wait. */
static void end_each_request_once(bool early)
{
    static const uint32_t queues[2] = {TAPFS_MOVES, TAPFS_OTHERS};
    pthread_t putters[PUTTERS], takers[2][TAKERS];
    unsigned left = 0;

    park_init(&shared);
    atomic_store(&refused, 0);
    atomic_store(&taken, 0);
    atomic_store(&waiting, 0);
    for (size_t i = 0; i < 2 * TAKERS; i++) {
        REQUIRE(pthread_create(&takers[i % 2][i / 2], NULL, take, (void *)(uintptr_t)&queues[i % 2]) == 0);
    }
    while (atomic_load(&waiting) < 2 * TAKERS) {
    }
    for (size_t i = 0; i < PUTTERS && !early; i++) {
        for (size_t j = 0; j < ROUNDS; j++) {
            atomic_store(&all[i][j].ended, 0);
        }
        REQUIRE(pthread_create(&putters[i], NULL, put, all[i]) == 0);
    }
    while (!early && atomic_load(&taken) < PUTTERS * ROUNDS / 2) {
    }
    for (struct parked_entry *entry = park_stop(&shared); entry != NULL; entry = entry->next) {
        atomic_fetch_add(&item_of(entry)->ended, 1);
        left++;
    }
    for (size_t i = 0; i < 2 * TAKERS; i++) {
        pthread_join(takers[i % 2][i / 2], NULL);
    }
    for (size_t i = 0; i < PUTTERS && !early; i++) {
        pthread_join(putters[i], NULL);
        for (size_t j = 0; j < ROUNDS; j++) {
            REQUIRE(atomic_load(&all[i][j].ended) == 1);
        }
    }
    REQUIRE(early || atomic_load(&taken) + atomic_load(&refused) + left == PUTTERS * ROUNDS);
    park_destroy(&shared);
}

int main(void)
{
    take_as_many_as_there_are();
    keep_the_order_of_each_queue();
    visit_what_waits_and_what_was_taken();
    find_what_was_taken_by_its_ticket();
    stop_hands_back_what_nobody_took();
    for (int i = 0; i < 10; i++) {
        end_each_request_once(true);
        end_each_request_once(false);
    }
    puts("ok");
    return 0;
}
