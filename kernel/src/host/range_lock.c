/* A lock on ranges: holders stand in a list in order of arrival, and each waits for the
 * conflicting ones before it. Nobody starves, and a thread holds one range at a time, so there is
 * no deadlock. */
#include "host/host.h"

void range_lock_init(struct range_lock *lock)
{
    pthread_mutex_init(&lock->mutex, NULL);
    pthread_cond_init(&lock->released, NULL);
    lock->first = lock->last = NULL;
    lock->waiting = 0;
}

void range_lock_destroy(struct range_lock *lock)
{
    pthread_cond_destroy(&lock->released);
    pthread_mutex_destroy(&lock->mutex);
}

static bool conflicts(const struct range_holder *left, const struct range_holder *right)
{
    return left->object == right->object && (left->exclusive || right->exclusive) && left->start < right->end &&
           right->start < left->end;
}

static bool must_wait(const struct range_holder *holder)
{
    for (const struct range_holder *other = holder->previous; other != NULL; other = other->previous) {
        if (conflicts(other, holder)) {
            return true;
        }
    }
    return false;
}

static void unlink_holder(struct range_lock *lock, struct range_holder *holder)
{
    *(holder->previous != NULL ? &holder->previous->next : &lock->first) = holder->next;
    *(holder->next != NULL ? &holder->next->previous : &lock->last) = holder->previous;
}

bool range_lock_acquire(struct range_lock *lock, struct range_holder *holder, bool try)
{
    bool held = true;
    pthread_mutex_lock(&lock->mutex);
    holder->next = NULL;
    holder->previous = lock->last;
    *(lock->last != NULL ? &lock->last->next : &lock->first) = holder;
    lock->last = holder;
    while (must_wait(holder)) {
        if (try) {
            unlink_holder(lock, holder);
            held = false;
            break;
        }
        lock->waiting++;
        pthread_cond_wait(&lock->released, &lock->mutex);
        lock->waiting--;
    }
    pthread_mutex_unlock(&lock->mutex);
    return held;
}

void range_lock_release(struct range_lock *lock, struct range_holder *holder)
{
    pthread_mutex_lock(&lock->mutex);
    unlink_holder(lock, holder);
    if (lock->waiting != 0) {
        pthread_cond_broadcast(&lock->released);
    }
    pthread_mutex_unlock(&lock->mutex);
}
