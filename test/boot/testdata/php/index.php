<?php
require __DIR__ . '/lib.php';
file_put_contents('php://stderr', 'ready ' . json_encode(['hello' => greet()]) . "\n");
sleep(3600);
