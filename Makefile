# Two commands matter to a newcomer: `make demo` and `make test`.
# Everything they need from elsewhere is installed or built by them and cached
# below ~/.cache/sluice.

RATE ?= 200
RTT  ?= 10ms

.PHONY: all build demo test quick lint clean

all: build

build: ## bin/sluice
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...

demo: build ## pull and stream a real image side by side; IMAGE=<OCI layout or docker-save tar> for your own
	go run -C test ./demo --src $(CURDIR) --rate $(RATE) --rtt $(RTT) $(if $(IMAGE),--image "$(abspath $(IMAGE))") $(if $(CMD),--cmd '$(CMD)')

test: ## everything that this machine can run; says what it skipped and why
	go run -C test ./runner --src $(CURDIR)

quick: ## what needs neither root nor downloads
	go vet ./... && go test ./...

lint:
	go run -C test ./runner --src $(CURDIR) --only lint

clean:
	rm -rf bin
