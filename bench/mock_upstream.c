/* A backend that costs next to nothing: the fixed point that proxies are measured against.
 *
 * One thread, epoll, kept connections. A request whose body holds `"stream":true` is answered
 * with CHUNKS server-sent events, one chunk and one write each, GAP_US apart (0: as fast as the
 * socket takes them); any other with one JSON chat completion.
 *
 *   mock_upstream HOST:PORT|/path.sock CHUNKS GAP_US
 *
 * Port 0 takes a free one; the port is printed when it listens.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define CONNECTIONS 4096
#define BUFFER (1 << 16)

struct conn {
    int open;
    int left;         /* chunks still to send; -1: no answer under way */
    int blocked;      /* waits for the socket to take more */
    uint64_t due_ns;  /* of the next chunk */
    size_t skip;      /* bytes of a long body still to come */
    size_t have;
    int streams;      /* what the head of the long body asked for */
    char data[BUFFER];
};

static struct conn *conns[CONNECTIONS];
static int epoll_fd, chunks;
static uint64_t gap_ns;

static const char *JSON =
    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,"
    "\"model\":\"mock\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
    "\"content\":\"Four. Two and two make four, whichever way you count them.\","
    "\"refusal\":null},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":"
    "{\"prompt_tokens\":12,\"completion_tokens\":14,\"total_tokens\":26}}";
static const char *EVENT =
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
    "\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" four\"},"
    "\"logprobs\":null,\"finish_reason\":null}]}\n\n";
static const char *STREAM_HEAD =
    "HTTP/1.1 200 OK\r\nServer: mock\r\nContent-Type: text/event-stream\r\n"
    "Transfer-Encoding: chunked\r\n\r\n";
static const char *STREAM_END = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

static char answer[2048], first[2048], next[1024];
static size_t answer_size, first_size, next_size;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void drop(int fd) {
    conns[fd]->open = 0;
    close(fd);
}

static void want(int fd, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, fd, &event);
}

/* Writes whole or, when the socket is full, not at all (pieces are far below its buffer). */
static int put(int fd, const char *data, size_t size) {
    ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
    if (sent == (ssize_t)size) return 1;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return 0;
    if (sent >= 0) {
        /* Split: finish it, however long that takes. */
        while ((size_t)sent < size) {
            ssize_t more = send(fd, data + sent, size - (size_t)sent, MSG_NOSIGNAL);
            if (more > 0) sent += more;
            else if (errno != EAGAIN) break;
        }
        if ((size_t)sent == size) return 1;
    }
    return -1;
}

static void stream(int fd) {
    struct conn *c = conns[fd];
    while (c->left >= 0) {
        int ok;
        if (c->left == chunks) ok = put(fd, first, first_size);
        else if (c->left > 0) ok = put(fd, next, next_size);
        else ok = put(fd, STREAM_END, strlen(STREAM_END));
        if (ok < 0) {
            drop(fd);
            return;
        }
        if (ok == 0) {
            c->blocked = 1;
            want(fd, EPOLLIN | EPOLLOUT);
            return;
        }
        if (c->blocked) {
            c->blocked = 0;
            want(fd, EPOLLIN);
        }
        c->left--;
        if (gap_ns && c->left > 0) {
            c->due_ns += gap_ns;
            return;
        }
    }
}

static void serve(int fd, int streams) {
    struct conn *c = conns[fd];
    if (!streams) {
        if (put(fd, answer, answer_size) <= 0) drop(fd);
        return;
    }
    c->left = chunks;
    c->due_ns = now_ns();
    stream(fd);
}

/* Answers every request that is whole; leaves the rest in the buffer. */
static void parse(int fd) {
    struct conn *c = conns[fd];
    while (c->open && c->left < 0) {
        if (c->skip) {
            size_t eaten = c->have < c->skip ? c->have : c->skip;
            memmove(c->data, c->data + eaten, c->have - eaten);
            c->have -= eaten;
            c->skip -= eaten;
            if (c->skip) return;
            serve(fd, c->streams);
            continue;
        }
        char *end = memmem(c->data, c->have, "\r\n\r\n", 4);
        if (!end) return;
        size_t head = (size_t)(end - c->data) + 4, length = 0;
        *end = 0;
        char *field = strcasestr(c->data, "\r\ncontent-length:");
        if (field) length = strtoul(field + 17, NULL, 10);
        *end = '\r';
        size_t here = c->have - head < length ? c->have - head : length;
        int streams = memmem(end + 4, here, "\"stream\":true", 13) != NULL ||
                      memmem(end + 4, here, "\"stream\": true", 14) != NULL;
        memmove(c->data, c->data + head + here, c->have - head - here);
        c->have -= head + here;
        if (here < length) {
            c->skip = length - here;
            c->streams = streams;
            continue;
        }
        serve(fd, streams);
    }
}

static int listen_on(const char *where) {
    int fd;
    if (where[0] == '/') {
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        strncpy(address.sun_path, where, sizeof address.sun_path - 1);
        unlink(where);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
        if (bind(fd, (struct sockaddr *)&address, sizeof address)) return -1;
    } else {
        const char *colon = strrchr(where, ':');
        struct sockaddr_in address = {.sin_family = AF_INET};
        char host[64] = {0};
        if (!colon || (size_t)(colon - where) >= sizeof host) return -1;
        memcpy(host, where, (size_t)(colon - where));
        address.sin_port = htons((uint16_t)atoi(colon + 1));
        if (inet_pton(AF_INET, host, &address.sin_addr) != 1) return -1;
        fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        int on = 1;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(fd, (struct sockaddr *)&address, sizeof address)) return -1;
        socklen_t size = sizeof address;
        getsockname(fd, (struct sockaddr *)&address, &size);
        printf("%d\n", ntohs(address.sin_port));
    }
    if (listen(fd, 1024)) return -1;
    fflush(stdout);
    return fd;
}

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK), on = 1;
        if (fd < 0) return;
        if (fd >= CONNECTIONS) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (!conns[fd]) conns[fd] = malloc(sizeof **conns);
        memset(conns[fd], 0, offsetof(struct conn, data));
        conns[fd]->open = 1;
        conns[fd]->left = -1;
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

static void receive(int fd) {
    struct conn *c = conns[fd];
    ssize_t size = recv(fd, c->data + c->have, BUFFER - c->have, 0);
    if (size > 0) {
        c->have += (size_t)size;
        parse(fd);
    } else if (size == 0 || errno != EAGAIN) {
        drop(fd);
    }
}

/* Sends what is due; returns milliseconds until the next is, -1 for never. */
static int run_streams(void) {
    if (!gap_ns) return -1;
    uint64_t now = now_ns(), nearest = UINT64_MAX;
    for (int fd = 0; fd < CONNECTIONS; fd++) {
        struct conn *c = conns[fd];
        if (!c || !c->open || c->left < 0 || c->blocked) continue;
        if (c->due_ns <= now) {
            stream(fd);
            if (c->open && c->left < 0) parse(fd);
        }
        if (c->open && c->left >= 0 && c->due_ns < nearest) nearest = c->due_ns;
    }
    if (nearest == UINT64_MAX) return -1;
    now = now_ns();
    return nearest <= now ? 0 : (int)((nearest - now + 999999) / 1000000);
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: mock_upstream HOST:PORT|/path.sock CHUNKS GAP_US\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    struct rlimit files = {CONNECTIONS, CONNECTIONS};
    setrlimit(RLIMIT_NOFILE, &files);
    chunks = atoi(argv[2]);
    gap_ns = strtoull(argv[3], NULL, 10) * 1000;
    answer_size = (size_t)sprintf(answer,
                                  "HTTP/1.1 200 OK\r\nServer: mock\r\nContent-Type: "
                                  "application/json; charset=utf-8\r\nContent-Length: %zu\r\n\r\n%s",
                                  strlen(JSON), JSON);
    next_size = (size_t)sprintf(next, "%zx\r\n%s\r\n", strlen(EVENT), EVENT);
    first_size = (size_t)sprintf(first, "%s%s", STREAM_HEAD, next);
    epoll_fd = epoll_create1(0);
    int listener = listen_on(argv[1]);
    if (listener < 0) {
        perror(argv[1]);
        return 1;
    }
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, ready[256];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(epoll_fd, ready, 256, run_streams());
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) {
                accept_all(listener);
                continue;
            }
            if (ready[i].events & EPOLLOUT && conns[fd]->open) {
                stream(fd);
                if (conns[fd]->open && conns[fd]->left < 0) parse(fd);
            }
            if (ready[i].events & ~EPOLLOUT && conns[fd]->open) receive(fd);
        }
    }
}
