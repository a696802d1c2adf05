#!/usr/bin/env perl
use strict;
use warnings;
use HTTP::Daemon;
use JSON::PP;

$| = 1;
my $d = HTTP::Daemon->new(LocalAddr => '127.0.0.1') or die $!;
print 'ready ', encode_json({ url => '' . $d->url }), "\n";
while (my $c = $d->accept) { $c->close }
