/* The park: queues of requests and a list of those that were taken, under one lock. */
#include "serving/park.h"

void park_init(struct park *park)
{
    *park = (struct park){.taken = NULL};
    pthread_mutex_init(&park->lock, NULL);
    for (uint32_t i = 0; i < PARK_QUEUES; i++) {
        pthread_cond_init(&park->queues[i].filled, NULL);
    }
}

void park_destroy(struct park *park)
{
    for (uint32_t i = 0; i < PARK_QUEUES; i++) {
        pthread_cond_destroy(&park->queues[i].filled);
    }
    pthread_mutex_destroy(&park->lock);
}

static struct park_queue *queue_of(struct park *park, uint32_t number)
{
    return &park->queues[number < PARK_QUEUES ? number : TAPFS_OTHERS];
}

bool park_put(struct park *park, uint32_t number, struct parked_entry *entry)
{
    struct park_queue *queue = queue_of(park, number);

    pthread_mutex_lock(&park->lock);
    bool stopped = park->stopped;
    if (!stopped) {
        entry->next = NULL;
        *(queue->first != NULL ? &queue->last->next : &queue->first) = entry;
        queue->last = entry;
        pthread_cond_signal(&queue->filled);
    }
    pthread_mutex_unlock(&park->lock);
    return !stopped;
}

size_t park_next(struct park *park, uint32_t number, struct parked_entry **entries, size_t capacity)
{
    struct park_queue *queue = queue_of(park, number);
    size_t count = 0;

    pthread_mutex_lock(&park->lock);
    while (queue->first == NULL && !park->stopped) {
        pthread_cond_wait(&queue->filled, &park->lock);
    }
    while (count < capacity && queue->first != NULL) {
        struct parked_entry *entry = queue->first;
        queue->first = entry->next;
        entry->next = park->taken;
        park->taken = entry;
        entry->ticket = ++park->last_ticket;
        entries[count++] = entry;
    }
    pthread_mutex_unlock(&park->lock);
    return count;
}

size_t park_next_described(struct park *park, uint32_t number, tapfs_parked *parked, size_t capacity,
                           void (*describe)(const struct parked_entry *entry, tapfs_parked *parked))
{
    struct parked_entry *entries[TAPFS_PARKED_AT_ONCE];
    size_t count = park_next(park, number, entries, minimum(capacity, TAPFS_PARKED_AT_ONCE));
    for (size_t i = 0; i < count; i++) {
        describe(entries[i], &parked[i]);
    }
    return count;
}

struct parked_entry *park_taken(struct park *park, uint64_t ticket, bool remove)
{
    pthread_mutex_lock(&park->lock);
    struct parked_entry **link = &park->taken;
    while (*link != NULL && (*link)->ticket != ticket) {
        link = &(*link)->next;
    }
    struct parked_entry *entry = *link;
    if (entry != NULL && remove) {
        *link = entry->next;
    }
    pthread_mutex_unlock(&park->lock);
    return entry;
}

static void visit_list(struct parked_entry *entry, void (*visit)(struct parked_entry *entry, void *argument),
                       void *argument)
{
    for (; entry != NULL; entry = entry->next) {
        visit(entry, argument);
    }
}

void park_each(struct park *park, void (*visit)(struct parked_entry *entry, void *argument), void *argument)
{
    pthread_mutex_lock(&park->lock);
    for (uint32_t i = 0; i < PARK_QUEUES; i++) {
        visit_list(park->queues[i].first, visit, argument);
    }
    visit_list(park->taken, visit, argument);
    pthread_mutex_unlock(&park->lock);
}

struct parked_entry *park_stop(struct park *park)
{
    struct parked_entry *left = NULL, **end = &left;

    pthread_mutex_lock(&park->lock);
    park->stopped = true;
    for (uint32_t i = 0; i < PARK_QUEUES; i++) {
        struct park_queue *queue = &park->queues[i];
        *end = queue->first;
        if (queue->first != NULL) {
            end = &queue->last->next;
            queue->first = NULL;
        }
        /* Under the lock, so that no thread looks before and waits after. */
        pthread_cond_broadcast(&queue->filled);
    }
    pthread_mutex_unlock(&park->lock);
    return left;
}
