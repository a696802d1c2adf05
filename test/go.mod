module sluice/test

go 1.26.6

require sluice v0.0.0

require (
	github.com/distribution/reference v0.6.0 // indirect
	github.com/klauspost/compress v1.20.3 // indirect
	github.com/opencontainers/go-digest v1.0.0 // indirect
	github.com/opencontainers/image-spec v1.1.1 // indirect
	golang.org/x/time v0.16.0 // indirect
)

replace sluice => ../
