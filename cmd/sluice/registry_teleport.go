package main

import (
	"context"

	"sluice/internal/teleport"
)

// openTeleport opens what expands images for Teleport's clients.
func (s *server) openTeleport(context.Context) (err error) {
	c := s.config.Teleport
	if !c.Enabled {
		return nil
	}
	s.teleport, err = teleport.New(s.registry, s.index, teleport.Options{
		Directory: s.config.TeleportDirectory(), Workers: c.Workers, MaxRepositories: c.MaxRepositories, Auto: c.AutoEnable,
		MaxLayer: int64(c.MaxLayer), MaxImage: int64(c.MaxImage), Log: s.log,
	})
	if err != nil {
		return err
	}
	s.teleport.Export(s.metrics.Gauge, s.metrics.Counter)
	return nil
}
