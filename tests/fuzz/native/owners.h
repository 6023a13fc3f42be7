/* The owner of a served disk: threads that give each parked request what it lacks, by the functions of a front end. */
#ifndef OWNERS_H
#define OWNERS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "../../native/owned_disk.h"
#include "serving/serving.h"

#define OWNER_QUEUES 4u

struct front {
    size_t (*next)(void *device, uint32_t queue, tapfs_parked *parked);
    int (*resume)(void *device, uint64_t ticket, tapfs_parked *parked);
    void (*complete)(void *device, const tapfs_parked *parked);
    /* Whether the request is a read or a write, which may lack maps and places. */
    bool (*moves)(const tapfs_parked *parked);
};

struct owners {
    const struct front *front;
    void *device;
    pthread_t threads[OWNER_QUEUES];
};

struct owner {
    struct owners *owners;
    uint32_t queue;
};

static void *own(void *argument)
{
    struct owner owner = *(struct owner *)argument;
    const struct front *front = owner.owners->front;
    tapfs_parked parked;

    free(argument);
    while (front->next(owner.owners->device, owner.queue, &parked) > 0) {
        bool missing = front->moves(&parked);
        while (missing) {
            if (parked.outcome.status != TAPFS_MISS && parked.outcome.status != TAPFS_RESERVE) {
                break;
            }
            give_what_is_missing(disk, &parked);
            missing = front->resume(owner.owners->device, parked.ticket, &parked) != 0;
        }
        if (missing || !front->moves(&parked)) {
            front->complete(owner.owners->device, &parked);
        }
    }
    return NULL;
}

static inline void owners_start(struct owners *owners, const struct front *front, void *device)
{
    owners->front = front;
    owners->device = device;
    for (uint32_t i = 0; i < OWNER_QUEUES; i++) {
        struct owner *owner = malloc(sizeof *owner);
        REQUIRE(owner != NULL);
        *owner = (struct owner){owners, i};
        REQUIRE(pthread_create(&owners->threads[i], NULL, own, owner) == 0);
    }
}

/* After the device has been stopped. */
static inline void owners_end(struct owners *owners)
{
    for (uint32_t i = 0; i < OWNER_QUEUES; i++) {
        pthread_join(owners->threads[i], NULL);
    }
}

#endif
