/* Clients that a gateway must not mind: they hold connections and hardly use them.
 *
 *   slow HOST:PORT IDLE SLOW SPREAD_S SETTLE_S [HEADER…]
 *
 * IDLE connections are opened and say nothing. Of the SLOW ones a third drips its headers, a third
 * its body, a byte each two seconds, and a third asks for a stream and reads 16 bytes each two
 * seconds. They come evenly over SPREAD_S; whoever is cut comes back one to three seconds later.
 * Prints a line SETTLE_S after the last has come and stays until it is ended.
 *
 * It costs a fiftieth of a core, at the lowest priority: what is measured beside it is the gateway.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MS 1000000ull
#define TICK_MS 5
#define TURN_NS (2000 * MS)
#define CONNECT_NS (50 * MS)
#define REQUEST (1 << 14)
#define BODY 2000

enum kind { IDLE, HEAD_DRIP, BODY_DRIP, READER };

struct client {
    enum kind kind;
    int fd;          /* -1: away */
    size_t sent;     /* of the request */
    uint64_t due_ns; /* of its next step */
};

static struct sockaddr_in where;
static struct client *clients;
static int count, epoll_fd;
static char request[REQUEST];
static size_t head_size, request_size;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void leave(struct client *c, uint64_t at_ns) {
    close(c->fd);
    c->fd = -1;
    c->due_ns = at_ns + TURN_NS / 2 + (uint64_t)rand() % TURN_NS;
}

static void come(struct client *c, uint64_t at_ns) {
    int small = 4096;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) {
        perror("socket");
        exit(1);
    }
    if (c->kind == READER) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    if (connect(c->fd, (struct sockaddr *)&where, sizeof where) && errno != EINPROGRESS) {
        leave(c, at_ns);
        return;
    }
    c->sent = 0;
    c->due_ns = at_ns + CONNECT_NS;
    if (c->kind != READER) { /* nothing is expected but to be cut */
        struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = c};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
    }
}

/* How much of the request is to have been sent after the next step. */
static size_t goal(const struct client *c) {
    if (c->kind == READER) return request_size;
    if (c->kind == BODY_DRIP && !c->sent) return head_size;
    return c->sent + 1;
}

static void step(struct client *c, uint64_t at_ns) {
    char taken[16];
    ssize_t done;
    if (c->fd < 0) {
        come(c, at_ns);
        return;
    }
    c->due_ns = c->kind == IDLE ? UINT64_MAX : at_ns + TURN_NS;
    if (c->kind == IDLE) return;
    if (c->sent < request_size) {
        done = send(c->fd, request + c->sent, goal(c) - c->sent, MSG_NOSIGNAL);
        if (done > 0) c->sent += (size_t)done;
        else if (errno == EAGAIN) c->due_ns = at_ns + CONNECT_NS; /* not yet accepted */
    } else {
        done = recv(c->fd, taken, sizeof taken, 0);
    }
    if (done == 0 || (done < 0 && errno != EAGAIN)) leave(c, at_ns);
}

static void build_request(int headers, char **header) {
    char body[BODY + 256];
    size_t body_size;
    memset(request, 'x', BODY);
    body_size = (size_t)sprintf(body, "{\"model\":\"mock\",\"stream\":true,\"messages\":"
                                "[{\"role\":\"user\",\"content\":\"%.*s\"}]}", BODY, request);
    int n = sprintf(request, "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                    "Content-Type: application/json\r\nContent-Length: %zu\r\n", body_size);
    for (int i = 0; i < headers; i++) n += sprintf(request + n, "%s\r\n", header[i]);
    n += sprintf(request + n, "\r\n");
    memcpy(request + n, body, body_size);
    head_size = (size_t)n;
    request_size = head_size + body_size;
}

int main(int argc, char **argv) {
    if (argc < 6) return fprintf(stderr, "slow HOST:PORT IDLE SLOW SPREAD_S SETTLE_S\n"), 2;
    int idle = atoi(argv[2]), told = 0;
    double spread_s = atof(argv[4]), settle_s = atof(argv[5]);
    char *colon = strrchr(argv[1], ':');
    *colon = 0;
    where.sin_family = AF_INET;
    where.sin_port = htons((uint16_t)atoi(colon + 1));
    inet_pton(AF_INET, argv[1], &where.sin_addr);
    struct sched_param ordinary = {0};
    sched_setscheduler(0, SCHED_OTHER, &ordinary); /* whatever who starts it has */
    setpriority(PRIO_PROCESS, 0, 19);
    build_request(argc - 6, argv + 6);
    count = idle + atoi(argv[3]);
    clients = calloc((size_t)count, sizeof *clients);
    epoll_fd = epoll_create1(0);
    uint64_t start_ns = now_ns();
    for (int i = 0; i < count; i++) {
        clients[i].kind = i < idle ? IDLE : (enum kind)(HEAD_DRIP + i % 3);
        clients[i].fd = -1;
        /* Kinds come mixed: the golden ratio spreads every run of numbers evenly. */
        double place = (double)i * 0.6180339887498949;
        clients[i].due_ns = start_ns + (uint64_t)((place - (double)(long)place) * spread_s * 1e9);
    }
    uint64_t settled_ns = start_ns + (uint64_t)((spread_s + settle_s) * 1e9);
    struct epoll_event events[64];
    for (;;) {
        int n = epoll_wait(epoll_fd, events, 64, TICK_MS);
        uint64_t at_ns = now_ns();
        for (int k = 0; k < n; k++) leave(events[k].data.ptr, at_ns);
        for (int i = 0; i < count; i++)
            if (clients[i].due_ns <= at_ns) step(&clients[i], at_ns);
        if (!told && at_ns >= settled_ns) {
            told = 1;
            puts("settled");
            fflush(stdout);
        }
    }
}
