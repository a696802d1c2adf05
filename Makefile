# Two commands matter to a newcomer: `make demo` and `make test`.
# Everything they need from elsewhere is installed or built by them and cached
# below ~/.cache/sluice.

RATE ?= 200
RTT  ?= 10ms

# What both demonstrations run.
DEMO = go run -C test ./demo --src $(CURDIR) --rate $(RATE) --rtt $(RTT) $(if $(IMAGE),--image "$(abspath $(IMAGE))") $(if $(CMD),--cmd '$(subst ','\'',$(CMD))')

.PHONY: all help build demo demo-flows test quick lint manifests clean

all: build

help: ## this
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile

build: ## bin/sluice
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...

demo: build ## pull and stream a real image side by side (IMAGE=, CMD=, RATE=, RTT=)
	$(DEMO)

demo-flows: build ## the same, with Project Teleport beside them
	$(DEMO) --teleport

test: ## everything that this machine can run; says what it skipped
	go run -C test ./runner --src $(CURDIR)

quick: ## what needs neither root nor downloads
	go vet ./... && go test ./...

lint: ## what the linter says
	go run -C test ./runner --src $(CURDIR) --only lint

manifests: ## deploy/manifests, from deploy/chart
	go run -C test ./manifests --src $(CURDIR)

clean: ## remove bin
	rm -rf bin
