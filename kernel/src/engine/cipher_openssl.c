/* AES of libcrypto. A context serves one request at a time, so idle ones are kept. */
#include <errno.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/cipher.h"

#define IDLE_MAX 8
#define KEY_MAX 64

/* Idle contexts, by direction, with the key in them; the first of each is the pattern of the others. */
struct openssl_cipher {
    pthread_mutex_t mutex;
    EVP_CIPHER *algorithm;
    EVP_CIPHER_CTX *keyed[2];
    EVP_CIPHER_CTX *idle[2][IDLE_MAX];
    size_t idle_count[2];
};

static bool has(uint32_t algorithm, uint32_t mode, size_t key_bytes)
{
    if (algorithm != TAPFS_CIPHER_AES) {
        return false;
    }
    if (mode == TAPFS_CIPHER_XTS) {
        return key_bytes == 32 || key_bytes == 64;
    }
    return (mode == TAPFS_CIPHER_ECB || mode == TAPFS_CIPHER_CBC || mode == TAPFS_CIPHER_CTR) &&
           (key_bytes == 16 || key_bytes == 24 || key_bytes == 32);
}

static EVP_CIPHER *fetch(uint32_t mode, size_t key_bytes)
{
    static const char *const modes[] = {[TAPFS_CIPHER_ECB] = "ECB",
                                        [TAPFS_CIPHER_CBC] = "CBC",
                                        [TAPFS_CIPHER_CTR] = "CTR",
                                        [TAPFS_CIPHER_XTS] = "XTS"};
    char name[16];
    size_t bits = 8 * (mode == TAPFS_CIPHER_XTS ? key_bytes / 2 : key_bytes);
    (void)snprintf(name, sizeof name, "AES-%zu-%s", bits, modes[mode]);
    return EVP_CIPHER_fetch(NULL, name, NULL);
}

static EVP_CIPHER_CTX *keyed(const EVP_CIPHER *algorithm, const uint8_t *key, int encrypt)
{
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    if (context != NULL && (EVP_CipherInit_ex2(context, algorithm, key, NULL, encrypt, NULL) != 1 ||
                            EVP_CIPHER_CTX_set_padding(context, 0) != 1)) {
        EVP_CIPHER_CTX_free(context);
        context = NULL;
    }
    return context;
}

static void close_cipher(void *opened)
{
    struct openssl_cipher *cipher = opened;
    if (cipher == NULL) {
        return;
    }
    for (size_t direction = 0; direction < 2; direction++) {
        while (cipher->idle_count[direction] > 0) {
            EVP_CIPHER_CTX_free(cipher->idle[direction][--cipher->idle_count[direction]]);
        }
        EVP_CIPHER_CTX_free(cipher->keyed[direction]);
    }
    EVP_CIPHER_free(cipher->algorithm);
    pthread_mutex_destroy(&cipher->mutex);
    free(cipher);
}

static void *open_cipher(uint32_t algorithm, uint32_t mode, const uint8_t *key, size_t key_bytes)
{
    (void)algorithm; /* AES */
    struct openssl_cipher *cipher = calloc(1, sizeof *cipher);
    if (cipher == NULL) {
        return NULL;
    }
    pthread_mutex_init(&cipher->mutex, NULL);
    cipher->algorithm = fetch(mode, key_bytes);
    for (int direction = 0; direction < 2 && cipher->algorithm != NULL; direction++) {
        cipher->keyed[direction] = keyed(cipher->algorithm, key, direction);
    }
    if (cipher->keyed[0] == NULL || cipher->keyed[1] == NULL) {
        close_cipher(cipher);
        return NULL;
    }
    return cipher;
}

static EVP_CIPHER_CTX *take(struct openssl_cipher *cipher, bool encrypt)
{
    EVP_CIPHER_CTX *context = NULL;

    pthread_mutex_lock(&cipher->mutex);
    if (cipher->idle_count[encrypt] > 0) {
        context = cipher->idle[encrypt][--cipher->idle_count[encrypt]];
    }
    pthread_mutex_unlock(&cipher->mutex);
    if (context == NULL) {
        context = EVP_CIPHER_CTX_new();
        if (context != NULL && EVP_CIPHER_CTX_copy(context, cipher->keyed[encrypt]) != 1) {
            EVP_CIPHER_CTX_free(context);
            context = NULL;
        }
    }
    return context;
}

static void give_back(struct openssl_cipher *cipher, bool encrypt, EVP_CIPHER_CTX *context)
{
    pthread_mutex_lock(&cipher->mutex);
    if (cipher->idle_count[encrypt] < IDLE_MAX) {
        cipher->idle[encrypt][cipher->idle_count[encrypt]++] = context;
        context = NULL;
    }
    pthread_mutex_unlock(&cipher->mutex);
    EVP_CIPHER_CTX_free(context);
}

static int apply(void *opened, bool encrypt, uint8_t *buffer, uint32_t bytes, uint8_t (*ivs)[CIPHER_IV_BYTES],
                 size_t count)
{
    EVP_CIPHER_CTX *context = take(opened, encrypt);
    if (context == NULL) {
        return ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        uint8_t *sector = buffer + i * bytes;
        int done = 0;
        if ((ivs != NULL && EVP_CipherInit_ex2(context, NULL, NULL, ivs[i], encrypt, NULL) != 1) ||
            EVP_CipherUpdate(context, sector, &done, sector, (int)bytes) != 1 || done != (int)bytes) {
            EVP_CIPHER_CTX_free(context);
            return EIO;
        }
    }
    give_back(opened, encrypt, context);
    return 0;
}

const struct cipher_library openssl_ciphers = {
    .has = has, .open = open_cipher, .close = close_cipher, .apply = apply};
